"""meshway serve: a run's checkpoint over HTTP, as OpenAI's clients speak it.

    meshway serve --model_dir=runs/quickstart --port=8000

Everything is compiled before the port is open. SIGTERM ends it once what has begun is answered.
"""

import dataclasses
import signal
import sys
from typing import TYPE_CHECKING

import jax

from meshway.framework import terminal
from meshway.framework.distributed import processes
from meshway.framework.errors import UserError
from meshway.framework.files import local_path
from meshway.framework.inference.predictor import Session, open_session
from meshway.framework.inference.recipe_model import RecipeModel
from meshway.framework.inference.sampling import Sampling
from meshway.framework.telemetry import compilation_cache
from meshway.framework.telemetry.profiler import Compilations
from meshway.launch import layout_choice
from meshway.launch.convert_in import ORIGIN
from meshway.launch.infer import with_vocabularies

try:
    from meshway.framework.serving.batch_routes import routes
    from meshway.framework.serving.batches import Batches
    from meshway.framework.serving.chat import ChatTemplate
    from meshway.framework.serving.http import SCORED_TOGETHER, Api
    from meshway.framework.serving.metrics import Metrics
    from meshway.framework.serving.openai_requests import MOST_CHOICES, ServedModel
    from meshway.framework.serving.scheduler import Scheduler
    from meshway.framework.serving.server import Server, bound_socket
except ImportError as error:
    raise UserError(f"meshway serve needs more packages: pip install 'meshway[serve]' ({error})") from error
from meshway.framework.serving.beams import BeamPool
from meshway.framework.serving.grammar import Grammars
from meshway.framework.serving.scorer import Scorer
from meshway.framework.serving.slots import SlotPool

if TYPE_CHECKING:
    from meshway.launch.recipe.config import Invocation


@dataclasses.dataclass(frozen=True)
class Room:
    """What a server keeps room for.

    Attributes:
      slots: requests that are decoded together.
      max_length: tokens of a slot: of prompt and prediction or, behind an encoder, of the prediction; None: as many
        as the recipe's TASK_FEATURE_LENGTHS say.
      max_input_length: the most tokens of a prompt; None: by the same lengths, or what a slot holds.
      max_queue: predictions that may wait, of each priority.
      chunk: tokens of a prompt that are read between two steps of the others.
      max_top_log_probs: likeliest tokens that a request may ask for at each place.
      kept_prompts: prompts of which a copy is kept, for others that begin alike; each takes the memory of a slot.
      guesses: tokens that are guessed in a step, from what followed the same few before; see `SlotPool`.
      beams: the most of a search; 1: none is served.
      beam_slots: searches that go on together.
    """

    slots: int = 8
    max_length: int | None = None
    max_input_length: int | None = None
    max_queue: int = 256
    chunk: int = 64
    max_top_log_probs: int = 20
    kept_prompts: int = 4
    guesses: int = 0
    beams: int = 1
    beam_slots: int = 2


@dataclasses.dataclass(frozen=True)
class Door:
    """Who is let in, and for how long.

    Attributes:
      host, port: where it listens; port 0 takes a free one, and says which.
      token_file: a file of bearer tokens, one a line, of which a request must bear one; None asks for none.
      max_body_bytes: of a request.
      request_seconds: that a request may take; None for any number.
      drain_seconds: for what has begun, once the server is told to end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token_file: str | None = None
    max_body_bytes: int = 4 << 20
    request_seconds: float | None = None
    drain_seconds: float = 30.0

    def tokens(self) -> list[bytes]:
        """Returns the tokens; UserError where the file has none, or cannot be read."""
        if self.token_file is None:
            return []
        try:
            lines = local_path(self.token_file).read_bytes().split()
        except OSError as error:
            raise UserError(f"--token_file={self.token_file}: {error.strerror}") from error
        if not lines:
            raise UserError(f"--token_file={self.token_file} holds no token: write one a line")
        return lines


def serve(
    opened: RecipeModel,
    model_dir: str,
    room: Room,
    door: Door,
    name: str | None = None,
    step: int | None = None,
    averaged: bool = False,
    batch_dir: str | None = None,
    chat_template: str | None = None,
) -> int:
    """Serves a checkpoint until SIGTERM or Ctrl-C.

    Args:
      opened: model and layout of the recipe; any layout.
      model_dir: the run directory, or one of its checkpoints.
      room: slots, lengths and queues.
      door: the address, and who may come.
      name: of the model in requests; None: the run directory's.
      step: which checkpoint; None for the latest that can be read.
      averaged: whether to read the averages of parameters that the run kept (EMA_DECAY).
      chat_template: a Hugging Face directory with the template of chats; None: what a converted run keeps of its own.
      batch_dir: where files and batches are kept; None serves none.

    Returns:
      the exit code.

    Raises:
      UserError: anything the user can mend; one message.
    """
    if jax.process_count() > 1:
        raise UserError("meshway serve runs as one process")
    if batch_dir is not None and not local_path(batch_dir).absolute().parent.is_dir():
        raise UserError(f"--batch_dir={batch_dir}: there is no folder {str(local_path(batch_dir).absolute().parent)!r}")
    tokens, listening = door.tokens(), bound_socket(door.host, door.port)
    with listening:
        session = open_session(opened, model_dir, step, say=_say, averaged=averaged)
        templates = session.run / ORIGIN if chat_template is None else local_path(chat_template)
        chat = ChatTemplate.read(templates, session.text.inputs)
        if chat is None and chat_template is not None:
            raise UserError(f"--chat_template={chat_template} holds no chat template (chat_template.jinja)")
        model = dataclasses.replace(_served(opened, session, room, name or session.run.name), chat=chat)
        scheduler, scorer, pool = _engine(session, model, room)
        with Compilations() as compilations:
            facts = {"checkpoint": str(session.step), "layout": _mesh(session), "slot": f"{model.max_length:,} tokens"}
            limits = (door.max_body_bytes, door.request_seconds)
            api = Api(model, scheduler, scorer, _metrics(scheduler, pool, compilations), facts, tokens, *limits)
            batches = [] if batch_dir is None else [Batches(local_path(batch_dir), api.answer, api.batch_endpoints)]
            app = api.app([route for each in batches for route in routes(each)])
            if programs := compilation_cache.in_words():
                _say(programs)
            _say(f"{model.name}, checkpoint {session.step}: {room.slots} slots of {model.max_length:,} tokens")
            ended_by = Server(api, app, scheduler, door.drain_seconds, _say, batches).run(listening)
    return 128 + ended_by if ended_by == signal.SIGINT else 0


def _engine(session: Session, model: ServedModel, room: Room) -> tuple[Scheduler, Scorer, SlotPool]:
    """Returns what computes answers, compiled."""
    lengths = (model.max_length, model.max_input_length if session.row_format.has_encoder else 0)
    pool = SlotPool(session, room.slots, *lengths, room.chunk, room.max_top_log_probs, room.kept_prompts, room.guesses)
    together = room.slots if session.sharded.partitioner.mesh.size > 1 else min(room.slots, SCORED_TOGETHER)
    scorer = Scorer(session, *lengths, together, room.max_top_log_probs)
    beams = None
    if room.beams > 1:
        beams = BeamPool(session, room.beam_slots, room.beams, model.max_length, model.max_input_length)
    warm_ups = {"slots": pool.warm_up, "scores": scorer.warm_up} | ({"searches": beams.warm_up} if beams else {})
    for what, warm_up in warm_ups.items():
        with terminal.stage(f"compiling the programs of {what}"):
            warm_up()
    return Scheduler(session.text, pool, beams, room.max_queue), scorer, pool


def _served(opened: RecipeModel, session: Session, room: Room, name: str) -> ServedModel:
    """Returns what requests are checked against."""
    form = session.row_format
    limits = opened.limits(room.max_input_length, None)
    lengths = form.room(limits["inputs"], limits["targets"], scores=False)
    whole = lengths["targets"] if form.has_encoder else sum(lengths.values())
    max_length = room.max_length or whole
    most = max_length - 1 if room.max_input_length is None else min(room.max_input_length, max_length - 1)
    return ServedModel(
        name,
        session.text,
        form,
        max_length,
        lengths["inputs"] if form.has_encoder else most,
        room.max_top_log_probs,
        room.beams,
        min(MOST_CHOICES, room.max_queue),
        _grammars(session),
    )


def _grammars(session: Session) -> Grammars | None:
    """Returns what compiles the forms that texts must have; None, which is said, where the vocabulary allows none."""
    try:
        return Grammars(session.text.targets, session.text.stop)
    except UserError as error:
        _say(f"response_format, regex and choice are not served: {error}")
        return None


def _mesh(session: Session) -> str:
    """Returns in words over what the model lies."""
    axes = session.sharded.partitioner.mesh.shape
    return ", ".join(f"{axis}={size}" for axis, size in axes.items() if size > 1) or "one device"


def _metrics(scheduler: Scheduler, pool: SlotPool, compilations: Compilations) -> Metrics:
    gauges = {
        "slots": ("Slots there are", lambda: scheduler.num_slots),
        "slots_used": ("Slots that have a request", lambda: scheduler.slots_used),
        "waiting_online": ("Requests that wait for a slot", lambda: scheduler.queued["online"]),
        "waiting_batch": ("Requests of batches that wait for a slot", lambda: scheduler.queued["batch"]),
        "stalled_seconds": ("Since the engine last did something, while work waits", lambda: scheduler.stalled_seconds),
    }
    counters = {
        "compilations_after_warm_up": ("Programs compiled after the port was opened", lambda: compilations.count),
        "prefix_hits": ("Prompts that began like one that was kept", lambda: pool.prefix_hits),
        "reused_tokens": ("Tokens of prompts that were not read again", lambda: pool.reused_tokens),
    }
    return Metrics(gauges, counters)


def _say(line: str) -> None:
    print(f"meshway: {line}", file=sys.stderr, flush=True)


def run(invocation: "Invocation") -> int:
    """Runs the verb from the command line."""
    from meshway.launch.recipe import config, files

    with processes.joined(*invocation.processes):
        auto = files.is_auto(invocation)
        invocation = files.of_run(files.on_one_device(invocation))
        recipe = config.load(invocation, import_unreferenced=False)
        with recipe.parts("serve.serve") as part:  # of gin/runs/serve.gin
            opened: RecipeModel = part("opened")  # MODEL, LAYOUT and TASK_FEATURE_LENGTHS
            model_dir: str = part("model_dir")  # MODEL_DIR
            room: Room = part("room")  # --slots, --max_length, --max_queue, ...
            door: Door = part("door")  # --host, --port, --token_file, ...
            how = part.rest()  # --name, --step, --averaged
        if auto:
            work = opened.largest(Sampling(temperature=0.0), room.slots, room.max_input_length, None)
            opened = layout_choice.with_layout(invocation, opened, work, invocation.options.topology, _say)
        return serve(with_vocabularies(opened, invocation), model_dir, room, door, **how)


if __name__ == "__main__":
    from meshway.launch import cli

    sys.exit(cli.main(["serve", *sys.argv[1:]]))
