"""Makes `generated.npz` in some folders of `tests/goldens/hugging_face/`: what transformers' `generate` makes of them.

Run `python tests/goldens/make_generations.py [NAME ...]` as `make_hugging_face.py`, after it. Each file holds

- `input_ids` and `attention_mask` int32 [rows, length]: prompts of different lengths, padded on the left as `generate`
  takes them; of encoder-decoders the encoder's inputs, padded on the right;
- `end`, the token that ends a prediction, chosen so that predictions end at many lengths;
- `greedy` and `penalized` (repetition_penalty=1.5) int32 [rows, NEW], zeros after the end;
- `beams_P` int32 [rows, BEAMS, NEW] and `scores_P` float32 [rows, BEAMS] for each length penalty P, best first.
"""

import copy
import sys
from collections.abc import Sequence

import numpy as np
import torch
import transformers
from make_hugging_face import FOLDER, Batch, read

NAMES = ("t5_1_1", "llama3", "qwen3")
ROWS, LENGTH, NEW, BEAMS = 6, 9, 12, 4
LENGTH_PENALTIES = (0.0, 1.0, 2.0)


def prompts(config: transformers.PreTrainedConfig, seed: int) -> Batch:
    """Returns rows of 9, 8, 6, 4, 2 and 1 random tokens."""
    lengths = np.array([9, 8, 6, 4, 2, 1])[:, None]
    there = np.arange(LENGTH) < lengths if config.is_encoder_decoder else np.arange(LENGTH) >= LENGTH - lengths
    tokens = np.random.default_rng(seed).integers(2, config.vocab_size, there.shape)
    return {"input_ids": (tokens * there).astype(np.int32), "attention_mask": there.astype(np.int32)}


def generate(
    model: transformers.PreTrainedModel, batch: Batch, end: int, **options: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns what follows the prompts, int32 [predictions, NEW], zeros after the end, and beams' scores."""
    inputs = {name: torch.from_numpy(values.astype(np.int64)) for name, values in batch.items()}
    config = transformers.GenerationConfig(
        max_new_tokens=NEW,
        eos_token_id=end,
        pad_token_id=0,
        decoder_start_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        use_cache=False,  # transformers makes a T5 decoder's as deep as its encoder
        **options,
    )
    with torch.no_grad():
        made = model.generate(**inputs, generation_config=config)
    start = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    tokens = made.sequences[:, start:].numpy().astype(np.int32)
    tokens = np.pad(tokens, ((0, 0), (0, NEW - tokens.shape[1])))
    scores = made.sequences_scores.numpy() if "sequences_scores" in made else None
    return np.where(np.arange(NEW) < lengths(tokens, end)[:, None], tokens, 0), scores


def lengths(tokens: np.ndarray, end: int) -> np.ndarray:
    """Returns how many tokens each prediction [predictions, NEW] has, its end included."""
    ended = tokens == end
    return np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, NEW)


def outputs(model: transformers.PreTrainedModel, batch: Batch, end: int) -> Batch:
    """Returns what is stored of the predictions."""
    found = {"greedy": generate(model, batch, end)[0]}
    found["penalized"] = generate(model, batch, end, repetition_penalty=1.5)[0]
    for penalty in LENGTH_PENALTIES:
        options = {"num_beams": BEAMS, "num_return_sequences": BEAMS, "length_penalty": penalty}
        tokens, scores = generate(model, batch, end, **options)
        found[f"beams_{penalty:g}"] = tokens.reshape(ROWS, BEAMS, NEW)
        found[f"scores_{penalty:g}"] = scores.reshape(ROWS, BEAMS)
    return found


def telling_end(model: transformers.PreTrainedModel, batch: Batch) -> int:
    """Returns the token with which predictions end at the most different lengths."""

    def tells(end: int) -> int:
        greedy, _ = generate(model, batch, end)
        beams, _ = generate(model, batch, end, num_beams=BEAMS)
        return len(set(lengths(greedy, end))) + len(set(lengths(beams, end)))

    return max(range(2, model.config.vocab_size), key=tells)


def check(model: transformers.PreTrainedModel, batch: Batch, end: int, found: Batch) -> None:
    """Raises AssertionError where predictions tell little, or weights that differ by 1e-5 give others."""
    best = found["beams_1"][:, 0]
    assert len(set(lengths(best, end))) > 2 and len(set(lengths(found["greedy"], end))) > 2, "they end alike"
    assert (best != found["greedy"]).any() and (best != found["beams_0"][:, 0]).any(), "rules do not matter"
    assert len(np.unique(found["greedy"])) > 10, "few tokens are used"
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 1e-5 * torch.randn(parameter.shape, generator=generator))
    for name, values in outputs(other, batch, end).items():
        if not name.startswith("scores"):
            np.testing.assert_array_equal(values, found[name], err_msg=f"{name} hangs on rounding")


def main(names: Sequence[str]) -> None:
    """Makes the named files, or all."""
    for name in names or NAMES:
        config = transformers.AutoConfig.from_pretrained(FOLDER / name)
        model = read(getattr(transformers, config.architectures[0]), FOLDER / name)
        for seed in range(100):
            batch = prompts(config, seed)
            end = telling_end(model, batch)
            found = outputs(model, batch, end)
            try:
                check(model, batch, end, found)
                break
            except AssertionError as error:
                print(f"{name}: not the prompts of seed {seed}: {str(error).strip().splitlines()[0]}")
        else:
            raise AssertionError(f"{name}: no prompts tell anything")
        path = FOLDER / name / "generated.npz"
        np.savez_compressed(path, **batch, **found, end=np.int32(end))
        print(f"{name}: {path.stat().st_size / 1000:.1f} kB, lengths {lengths(found['beams_1'][:, 0], end)}")


if __name__ == "__main__":
    main(sys.argv[1:])
