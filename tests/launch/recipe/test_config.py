"""What a recipe builds, and how its resolved text comes back to the same recipe."""

import sys

import gin
import pytest

from meshway.framework.errors import UserError
from meshway.launch.recipe.reachability import Walk, binding_key
from meshway.launch.recipe.text import Binding, Place, Reference, Target


def test_a_recipe_builds_the_arguments_of_the_verb(lab):
    built = lab.load("TRAIN_STEPS=3").build("train.train")
    assert built["steps"] == 3
    assert built["model_dir"] == "/tmp/run"
    assert built["mesh"].ici == {"data": 1}
    assert [block.mlp.hidden for block in built["model"].blocks] == [8]
    assert type(built["model"]).__module__ == "lab.model"


def test_the_command_line_binds_by_the_spelling_of_files(lab):
    recipe = """
        include 'recipes/base.gin'
        model.Model.blocks = [@layers.Block, @wide/layers.Block]
        wide/layers.Mlp.hidden = 32
    """
    loaded = lab.load("layers.Block.heads=4", "wide/layers.Mlp.hidden=%layers.WIDTH", recipe=recipe)
    narrow, wide = loaded.build("train.train")["model"].blocks
    assert (narrow.mlp.hidden, narrow.heads) == (8, 4)
    assert (wide.mlp.hidden, wide.heads) == (64, 4)


def test_imports_of_included_files_carry_over(lab):
    loaded = lab.load(recipe="include 'recipes/base.gin'\nlayers.Mlp.hidden = 16")
    assert loaded.build("train.train")["model"].blocks[0].mlp.hidden == 16


def test_modules_of_one_name_stay_apart(lab):
    lab.write("lab/other/layers.py", "class Mlp:\n    def __init__(self, hidden):\n        self.hidden = -hidden\n")
    recipe = """
        include 'base'
        from lab.other import layers as other
        model.Model.blocks = [@layers.Block, @outer/layers.Block]
        outer/layers.Block.mlp = @other.Mlp
        other.Mlp.hidden = 5
    """
    built = lab.load(recipe=recipe).build("train.train")
    assert [block.mlp.hidden for block in built["model"].blocks] == [8, -5]


def test_a_module_constant_is_the_object_itself(lab):
    lab.write("lab/tables.py", "TABLE = [object()]\n")
    loaded = lab.load("model.Model.rate=%tables.TABLE", recipe="include 'base'\nfrom lab import tables")
    assert loaded.build("train.train")["model"].rate is sys.modules["lab.tables"].TABLE
    assert "%tables.TABLE" in loaded.resolved


def test_a_constant_does_not_shadow_a_macro_of_its_name(lab):
    lab.load("layers.Mlp.hidden=%layers.WIDTH").build("train.train")
    built = lab.load("WIDTH=5", "layers.Mlp.hidden=%WIDTH").build("train.train")
    assert built["model"].blocks[0].mlp.hidden == 5


def test_a_singleton_is_built_once(lab):
    lab.write("lab/verbs/train.py", "def train(model, steps, mesh=None, model_dir=None, layout=None): pass")
    recipe = """
        include 'base'
        train.train.steps = %MODEL
        MODEL = @one/gin.singleton()
        one/gin.singleton.constructor = @model.Model
    """
    built = lab.load(recipe=recipe).build("train.train")
    assert built["steps"] is built["model"]


def test_loading_again_forgets_the_former_recipe(lab):
    first = lab.load("layers.Block.heads=7")
    second = lab.load()
    assert second.build("train.train")["model"].blocks[0].heads == 2
    assert first.build("train.train")["model"].blocks[0].heads == 7


def test_two_spellings_of_one_object_are_one(lab):
    recipe = "include 'base'\nmodel.Model.blocks = [@model.Block]\nlayers.Block.heads = 3\nmodel.Block.heads = 5"
    loaded = lab.load(recipe=recipe)
    assert loaded.build("train.train")["model"].blocks[0].heads == 5
    assert "layers.Block.heads" not in loaded.resolved


@pytest.mark.parametrize(
    "bindings",
    [(), ("layers.Block.heads=4", "TRAIN_STEPS=3", "LAYOUT=fsdp"), ("layers.Block.mlp=@layers.Moe",)],
)
def test_the_resolved_text_gives_the_same_recipe_and_the_same_text(lab, bindings):
    loaded = lab.load(*bindings)
    path = lab.write("resolved.gin", loaded.resolved)
    again = lab.load(gin_files=[path])
    assert again.resolved == loaded.resolved
    shown = [
        [vars(b.mlp) | {"heads": b.heads} for b in r.build("train.train")["model"].blocks] for r in (loaded, again)
    ]
    assert shown[0] == shown[1]


@pytest.mark.parametrize(
    ("imports", "word"),
    [
        ("import lab.parts.rates", "lab.parts.rates"),
        ("from lab import parts\nimport lab.parts.rates", "parts.rates"),
        ("from lab.parts import rates", "rates"),
    ],
)
def test_defaults_are_written_out_in_the_words_of_the_recipe(lab, imports, word):
    made = "class Made:\n    def __init__(self, c=1):\n        self.c = c\n"
    rate = "class Rate:\n    def __init__(self, made=Made):\n        self.made = made()\n"
    lab.write("lab/parts/rates.py", made + rate)
    loaded = lab.load(recipe=f"include 'base'\n{imports}\nmodel.Model.rate = @{word}.Rate()\n{word}.Made.c = 3")
    assert f"\n{word}.Rate.made = @{word}.Made\n" in loaded.resolved
    assert sum("import" in line and "rates" in line for line in loaded.resolved.splitlines()) == 1
    again = lab.load(gin_files=[lab.write("resolved.gin", loaded.resolved)])
    assert again.resolved == loaded.resolved and again.build("train.train")["model"].rate.made.c == 3


def test_long_values_of_every_kind_come_back(lab):
    long = {f"key_{i}": [i, -1.5e-7, None, True, "it's " * 20, ("a", {})] for i in reversed(range(9))}
    loaded = lab.load(f"model.Model.rate={long!r}")
    again = lab.load(gin_files=[lab.write("resolved.gin", loaded.resolved)])
    assert repr(again.build("train.train")["model"].rate) == repr(long)
    assert again.resolved == loaded.resolved
    assert max(len(line) for line in loaded.resolved.splitlines()) <= 110


def test_the_resolved_text_keeps_what_other_verbs_need(lab):
    resolved = lab.load("TRAIN_STEPS=77", verb="inspect").resolved
    assert "TRAIN_STEPS = 77" in resolved
    lab.write("resolved.gin", resolved)
    assert lab.load(gin_files=["resolved.gin"]).build("train.train")["steps"] == 77


def test_a_dry_run_needs_no_directory(lab):
    loaded = lab.load(dry_run=True)
    assert loaded.build("train.train")["model_dir"] is None
    with pytest.raises(UserError, match=r"--gin.MODEL_DIR=\.\.\.  the run directory"):
        lab.load("MODEL_DIR=%gin.REQUIRED")


def test_what_the_caller_gives_need_not_be_bound(lab):
    lab.write("lab/verbs/train.py", "def train(model, steps, mesh, model_dir, layout, report): pass")
    loaded = lab.load()
    assert "report" not in loaded.build("train.train", given=["report"])
    with pytest.raises(UserError, match=r"train.train needs 'report'.*--gin.train.train.report="):
        loaded.build("train.train")


def test_a_verb_asks_for_its_arguments_one_by_one_and_may_forget_none(lab):
    lab.write("lab/verbs/train.py", "def train(model, steps, mesh, model_dir, layout, report=7): pass")
    with lab.load("TRAIN_STEPS=3").parts("train.train") as part:
        assert (part("steps"), part("report")) == (3, 7) and set(part.left()) == {
            "model",
            "mesh",
            "model_dir",
            "layout",
        }
        model, mesh = part("model"), part("mesh")
        assert part.rest() == {"model_dir": "/tmp/run", "layout": "single"} and part.left() == []
    assert mesh.ici == {"data": 1}
    assert model.blocks[0].heads == lab.load().build("train.train")["model"].blocks[0].heads
    said = "does not ask for what the recipe may bind to train.train: .*steps"
    with pytest.raises(AssertionError, match=said), lab.load().parts("train.train"):
        pass


def test_a_module_that_only_another_verb_needs_is_not_imported(lab):
    lab.write("lab/heavy.py", "def steps():\n    return 5\n")
    lab.write("lab/registering.py", "")
    recipe = """
        include 'base'
        from lab.verbs import train
        from lab import heavy
        import lab.registering
        train.train.steps = @heavy.steps()
    """
    lab.load(recipe=recipe, verb="inspect", import_unreferenced=False)
    assert not {"lab.heavy", "lab.registering", "lab.verbs.train"} & set(sys.modules)
    assert lab.load(recipe=recipe).build("train.train")["steps"] == 5
    assert {"lab.heavy", "lab.registering"} <= set(sys.modules)


def test_code_made_configurable_in_its_source_may_be_bound(lab):
    lab.write("lab/theirs.py", "import gin\n@gin.configurable\ndef helper(a=1):\n    return a\n")
    lab.load(recipe="include 'base'\nfrom lab import theirs\ntheirs.helper.a = 3").build("train.train")
    assert sys.modules["lab.theirs"].helper() == 3


def test_a_bad_value_names_the_constructor_and_the_line(lab):
    recipe = "include 'base'\n\nlayers.Mlp.hidden = -1"
    with pytest.raises(UserError) as error:
        lab.load(recipe=recipe).build("train.train")
    assert str(error.value) == "layers.Mlp: hidden must be positive, got -1 (bound: hidden at recipe.gin:3)"


def test_a_bad_value_is_traced_through_macros(lab):
    with pytest.raises(UserError, match=r"got -2 \(bound: hidden at --gin.WIDE\)$"):
        lab.load("WIDE=-2", recipe="include 'base'\nWIDE = 1\nlayers.Mlp.hidden = %WIDE").build("train.train")


def test_an_error_that_names_no_argument_shows_the_latest_bindings_first(lab):
    lab.write(
        "lab/mesh.py",
        "class MeshShape:\n    def __init__(self, ici, dcn=1):\n        raise ValueError('no')\n",
    )
    recipe = "include 'base'\nLAYOUT = 'single'\nmesh.MeshShape.dcn = 2\n"
    with pytest.raises(UserError, match=r"^mesh.MeshShape: no \(bound: ici at --gin.*, dcn at recipe.gin:3\)$"):
        lab.load("mesh.MeshShape.ici=3", recipe=recipe).build("train.train")


def test_an_error_of_the_framework_keeps_its_words(lab):
    text = "from meshway.framework.errors import UserError\n"
    text += "class MeshShape:\n    def __init__(self, ici):\n        raise UserError('8 devices, 2 are here')\n"
    lab.write("lab/mesh.py", text)
    with pytest.raises(UserError, match="^8 devices, 2 are here$"):
        lab.load().build("train.train")


def test_a_factory_called_without_an_argument_names_the_binding_to_add(lab):
    recipe = lab.folder.joinpath("gin/recipes/base.gin").read_text().replace("layers.Mlp.hidden = 8", "")
    with pytest.raises(UserError, match="^layers.Mlp is called without .*; bind layers.Mlp.hidden$"):
        lab.load(recipe=recipe).build("train.train")


def test_a_value_that_is_called_as_a_parameter_is_blames_no_binding(lab):
    text = "from meshway.framework.errors import UserError\n"
    text += "class MeshShape:\n    def __init__(self, ici):\n        raise UserError(\"no axis 'ici'; it is 'x'\")\n"
    lab.write("lab/mesh.py", text)
    with pytest.raises(UserError, match="^no axis 'ici'; it is 'x'$"):
        lab.load().build("train.train")


def test_a_bug_while_building_keeps_its_own_type(lab):
    lab.write("lab/mesh.py", "class MeshShape:\n    def __init__(self, ici):\n        raise KeyError('bug')\n")
    with pytest.raises(KeyError, match="bug"):
        lab.load().build("train.train")


def test_scopes_are_walked_as_gin_opens_them(lab):
    recipe = """
        include 'base'
        layers.Block.mlp = @inner/layers.Mlp
        inner/layers.Mlp.activation = 'gelu'
        MODEL/model.Model.depth = 3
    """
    model = lab.load(recipe=recipe).build("train.train")["model"]
    assert [block.mlp.activation for block in model.blocks] == ["gelu"] * 3


def test_the_innermost_scope_wins_whatever_the_order(lab):
    recipe = """
        include 'base'
        model.Model.blocks = [@wide/layers.Block]
        wide/layers.Block.mlp = @layers.Moe
        layers.Moe.experts = 5
        layers.Block.mlp = @layers.Mlp
    """
    assert lab.load(recipe=recipe).build("train.train")["model"].blocks[0].mlp.experts == 5


def test_a_factory_may_be_called_in_a_scope_that_another_reference_opens(lab):
    lab.write("lab/wrap.py", "class Wrap:\n    def __init__(self, inner):\n        self.inner = inner()\n")
    model = """
        class Model:
            def __init__(self, blocks=(), wrap=None, rate=0):
                self.blocks = [wrap(block) for block in blocks]
    """
    lab.write("lab/model.py", model)
    recipe = """
        include 'base'
        from lab import wrap
        model.Model.wrap = @deep/wrap.Wrap
        deep/layers.Block.heads = 9
    """
    assert lab.load(recipe=recipe).build("train.train")["model"].blocks[0].inner.heads == 9


def test_two_recipes_live_beside_each_other(lab):
    lab.write(
        "lab/theirs.py",
        "import gin\n@gin.configurable\nclass Rate:\n    def __init__(self, a=1):\n        self.a = a\n",
    )
    lab.write(
        "lab/model.py",
        "class Model:\n    def __init__(self, blocks=(), rate=0):\n        self.block, self.rate = blocks[0], rate\n",
    )
    recipe = """
        include 'base'
        from lab import theirs
        model.Model.rate = @theirs.Rate
        theirs.Rate.a = 3
    """
    teacher = lab.load("layers.Mlp.hidden=128", recipe=recipe).build("train.train")["model"]
    student = lab.load("theirs.Rate.a=4", recipe=recipe).build("train.train")["model"]
    for _ in range(2):
        assert teacher.block().mlp.hidden == 128 and teacher.rate().a == 3
        assert student.block().mlp.hidden == 8 and student.rate().a == 4
    assert sys.modules["lab.theirs"].Rate().a == 4, "called by nobody's recipe, it takes what the last one says"


def test_a_factory_of_a_teacher_keeps_out_of_the_scopes_of_its_student(lab):
    lab.write(
        "lab/model.py",
        "class Model:\n    def __init__(self, blocks=(), rate=0):\n        self.block, self.made = blocks[0], rate\n",
    )
    lab.write("lab/call.py", "FACTORY = []\ndef call():\n    return FACTORY[0]()\n")
    recipe = "include 'base'\nfrom lab import call\nmodel.Model.rate = @deep/call.call()\ndeep/layers.Block.heads = 9"
    teacher = """
        include 'base'
        model.Model.blocks = [@layers.Block, @deep/layers.Block]
        deep/layers.Block.heads = 5
    """
    first = lab.load(recipe=teacher).build("train.train")["model"]
    __import__("lab.call").call.FACTORY.append(first.block)
    assert lab.load(recipe=recipe).build("train.train")["model"].made.heads == 2


@pytest.mark.parametrize("decorated", [False, True])
def test_what_t5x_users_write_is_read(lab, decorated):
    """Constants, singletons, macros inside containers, scopes, and configurables of the user's own source."""
    mark = "@gin.configurable\n" if decorated else ""
    theirs = f"import gin\ngin.constant('lab.HEADS_{decorated}', 12)\ngin.constant('SEVEN_{decorated}', 7)\n"
    theirs += f"class Shared:\n    pass\n{mark}"
    theirs += "def rates(table, extra=None, shared=None):\n    return table, extra, shared\n"
    lab.write("lab/theirs.py", theirs)
    recipe = f"""
        include 'base'
        from lab import theirs
        WIDTHS = [1, %SMALL]
        SMALL = 2
        SHARED = @one/gin.singleton()
        one/gin.singleton.constructor = @theirs.Shared
        layers.Block.heads = %lab.HEADS_{decorated}
        model.Model.rate = @deep/theirs.rates()
        theirs.rates.table = {{'widths': %WIDTHS, 'seven': %SEVEN_{decorated}}}
        theirs.rates.extra = 1
        theirs.rates.shared = (%SHARED, %SHARED)
        deep/theirs.rates.extra = [@theirs.Shared, %SMALL]
    """
    loaded = lab.load(recipe=recipe)
    for each in (loaded, lab.load(recipe=loaded.resolved)):
        model = each.build("train.train")["model"]
        table, (factory, small), shared = model.rate
        assert table == {"widths": [1, 2], "seven": 7} and small == 2 and model.blocks[0].heads == 12
        assert type(factory()) is type(shared[0]) and shared[0] is shared[1]


def test_a_constant_may_have_the_name_of_the_package_that_makes_it(lab):
    lab.write("lab/theirs.py", "import gin\ngin.constant('lab.DEEP', 12)\n")
    loaded = lab.load(recipe="include 'base'\nimport lab.theirs\nlayers.Block.heads = %lab.DEEP")
    for each in (loaded, lab.load(recipe=loaded.resolved)):
        assert each.build("train.train")["model"].blocks[0].heads == 12


def test_a_constant_that_nobody_made_is_refused(lab):
    lab.write("lab/theirs.py", "import gin\ngin.constant('lab.ROOMS', 12)\n")
    with pytest.raises(UserError, match="lab.ROMS"):
        lab.load(recipe="include 'base'\nimport lab.theirs\nlayers.Block.heads = %lab.ROMS")


def test_methods_of_a_class_take_what_is_bound_to_them(lab):
    lab.write(
        "lab/model.py",
        """
        class Model:
            def __init__(self, blocks=(), rate=0):
                self.block = blocks[0]
            def width(self, a, b=1):
                return a, b
    """,
    )
    recipe = "include 'base'\nmodel.Model.width.b = 4\nMODEL/model.Model.width.a = 3\n"
    model = lab.load(recipe=recipe).build("train.train")["model"]
    assert model.width() == (3, 4) and model.width(5) == (5, 4) and model.width(5, b=6) == (5, 6)
    assert type(model).__name__ == "Model"


def test_a_default_that_is_a_class_is_as_configurable_as_a_reference(lab):
    lab.write(
        "lab/model.py",
        """
        from lab import layers

        class Inner:
            def __init__(self, mlp=layers.Mlp):
                self.mlp = mlp()

        def twice(inner=Inner, others=(Inner, 3)):
            return inner(), others[0](), others[1]

        class Model:
            def __init__(self, blocks=(), rate=0, make=twice, unbound=layers.Moe):
                self.made, self.unbound = make(), unbound
    """,
    )
    loaded = lab.load("deep/layers.Mlp.activation='gelu'", "MODEL=@deep/model.Model()")
    model = loaded.build("train.train")["model"]
    first, second, number = model.made
    assert first.mlp.hidden == second.mlp.hidden == 8 and number == 3 and first.mlp.activation == "gelu"
    assert model.unbound is sys.modules["lab.layers"].Moe
    assert "\nmodel.Inner.mlp = @layers.Mlp\n" in loaded.resolved and "unbound" not in loaded.resolved
    again = lab.load(recipe=loaded.resolved)
    assert again.resolved == loaded.resolved
    assert again.build("train.train")["model"].made[0].mlp.activation == "gelu"
    with pytest.raises(UserError, match="layers.Mlp: hidden must be positive, got -1"):
        lab.load("layers.Mlp.hidden=-1").build("train.train")


def test_a_default_that_is_a_class_is_followed_before_its_module_is_imported(lab):
    lab.write("lab/inner.py", "from lab import layers\n\ndef inner(mlp=layers.Mlp):\n    return mlp()\n")
    lab.write(
        "lab/outer.py", "def one():\n    pass\n\ndef two(one=one):\n    pass\n\ndef outer(two, inner):\n    pass\n"
    )

    def bound(module, name, parameter, value):
        return Binding("", f"{module}.{name}", parameter, value, Place("here"), Target(f"lab.{module}", (name,)))

    def reference(module, name):
        return Reference("", f"{module}.{name}", False, Target(f"lab.{module}", (name,)))

    bindings = [
        bound("outer", "outer", "two", reference("outer", "two")),
        bound("outer", "outer", "inner", reference("inner", "inner")),
        bound("layers", "Mlp", "hidden", 8),
    ]
    reach = Walk(bindings, importing=True).run([bindings[0].target])
    assert binding_key(bindings[2]) in reach.used and bindings[2].target in reach.targets


def test_gin_itself_is_left_with_this_recipe_only(lab):
    gin.parse_config("stale = 1")
    lab.load().build("train.train")
    assert "stale" not in gin.config_str()


def test_a_fingerprint_tells_what_a_function_hangs_on_and_nothing_else(lab):
    def of(*bindings, recipe="", without=("model_dir", "steps"), **options):
        return lab.load(*bindings, recipe=recipe, **options).fingerprint("train.train", without)

    first = of()
    assert of("MODEL_DIR=/tmp/other", "TRAIN_STEPS=11") == first, "left out"
    assert of("DROPOUT_RATE=0.5") != first and of("layers.Mlp.hidden=9") != first
    assert of("TRAIN_STEPS=11", without=()) != of(without=())
    assert of("model.Model.rate=%MODEL_DIR") == of("model.Model.rate=%MODEL_DIR", "MODEL_DIR=/tmp/other") != first
    spelt = """
        import lab.layers
        import lab.model as m
        DROPOUT_RATE = 0.0
        MODEL = @m.Model()
        m.Model.blocks = [@lab.layers.Block]
        m.Model.rate = %DROPOUT_RATE
        lab.layers.Block.mlp = @lab.layers.Mlp
        lab.layers.Mlp.hidden = 8
    """  # the shipped base, its modules imported otherwise
    assert of(recipe=spelt) == first
    assert of("LAYOUT=fsdp") != of("LAYOUT=single") == first
    assert of("LAYOUT=fsdp", without=("mesh", "layout")) == of("LAYOUT=single", without=("mesh", "layout"))
