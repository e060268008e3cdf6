"""The comparison of routings: its table, its mistakes, and what Batch Priority Routing gains on digits."""

import statistics

import pytest

from meshway.framework.errors import UserError
from meshway.launch.bench import routing
from meshway.launch.bench.routing import Routing, Variant
from meshway.launch.invocation import Invocation

RATIOS = (0.25, 0.15)


def test_the_table_has_a_line_a_ratio_and_way_of_training():
    found = {
        Variant(trained, evaluated, ratio): [80.0 + 10 * (evaluated == "score"), 82.0 + ratio]
        for trained in ("order", "score")
        for evaluated in ("order", "score")
        for ratio in RATIOS
    }
    lines = routing.format_table(found).splitlines()
    assert len(lines) == 2 + 4 and "mean of 2 seeds" in lines[0]
    assert lines[2].split() == ["in", "order", "0.25", "81.1", "%", "86.1", "%", "+5.0", "+0.0"]
    assert lines[5].startswith("by priority  0.15")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seeds": 0}, "bench.routing.Routing.seeds must be at least 1, not 0"),
        ({"trained": ("scores",)}, r"some of \['order', 'score'\]; not \['scores'\]"),
        ({"ratios": ()}, "needs ratios"),
    ],
)
def test_settings_that_cannot_be_meant(options, message):
    with pytest.raises(UserError, match=message):
        Routing(None, None, 5, **options)


@pytest.mark.proofs
def test_batch_priority_routing_beats_vanilla_where_room_is_short(tmp_path, capsys):
    """Four seeds gave 84.0 and 87.6 % with room for 0.25, 82.6 and 86.4 % for 0.15, no seed gaining less than 2.1."""
    invocation = Invocation(
        verb="bench",
        subject="routing",
        gin_files=("v_moe_digits",),
        bindings=(
            "LAYOUT='single'",
            f"CACHE_DIR='{tmp_path}'",
            "bench.routing.Routing.seeds=3",
            f"bench.routing.Routing.ratios={RATIOS}",
            "bench.routing.Routing.trained=('score',)",
        ),
    )
    found = routing.compare(invocation)
    for ratio in RATIOS:
        vanilla, priority = (statistics.mean(found[Variant("score", name, ratio)]) for name in ("order", "score"))
        assert priority > 80 and priority - vanilla > 1.8, (ratio, vanilla, priority)
    assert "by priority" in capsys.readouterr().out
