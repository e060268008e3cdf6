import importlib
import importlib.util
import sys

import polib
import pytest

from meshway.framework.data.seqio_adapter import import_seqio
from meshway.tasks import gettext

seqio = import_seqio()

from meshway.tasks import gettext as tasks  # noqa: E402

RUSSIAN = (
    "nplurals=4; plural=(n%10==1 && n%100!=11 ? 0 : n%10>=2 && n%10<=4 && (n%100<12 || n%100>14) ? 1 : "
    "n%10==0 || (n%10>=5 && n%10<=9) || (n%100>=11 && n%100<=14)? 2 : 3);"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(tmp_path))
    gettext._messages.cache_clear()
    gettext.messages.cache_clear()
    return tmp_path


def catalogue(path, *entries, plurals=RUSSIAN):
    file = polib.POFile()
    file.metadata = {"Content-Type": "text/plain; charset=utf-8", "Plural-Forms": plurals}
    file.extend(entries)
    file.save(str(path))
    return path


def extracted(*paths):
    return [gettext.Message(*entry) for entry in gettext.json.loads(gettext._extract(list(paths)))]


def test_what_is_translated_is_found_once_with_its_context(tmp_path):
    entry = polib.POEntry
    first = catalogue(
        tmp_path / "first.po",
        entry(msgid="Yes", msgstr="Да"),
        entry(msgid="May", msgstr="Май", msgctxt="full month"),
        entry(msgid="May", msgstr="май"),
        entry(msgid="No", msgstr="Нет", flags=["fuzzy"]),
        entry(msgid="Old", msgstr="Старый", obsolete=True),
        entry(msgid="Empty", msgstr=""),
    )
    second = catalogue(tmp_path / "second.po", entry(msgid="Yes", msgstr="Ага"), entry(msgid="Home", msgstr="Дом"))
    assert extracted(first, second) == [
        gettext.Message("Yes", "", "Yes", "Да"),
        gettext.Message("May", "full month", "May", "Май"),
        gettext.Message("May", "", "May", "май"),
        gettext.Message("Home", "", "Home", "Дом"),
    ]


def test_plurals_give_an_example_for_each_form_at_its_first_count(tmp_path):
    forms = dict(enumerate(["%d день", "%d дня", "%d дней", "%d дней"]))
    days = polib.POEntry(msgid="%d day", msgid_plural="%d days", msgstr_plural=forms, msgctxt="age")
    assert [(m.context, m.english, m.translation) for m in extracted(catalogue(tmp_path / "a.po", days))] == [
        ("age, n=1", "%d day", "%d день"),
        ("age, n=2", "%d days", "%d дня"),
        ("age, n=5", "%d days", "%d дней"),
    ]
    days = polib.POEntry(msgid="%d day", msgid_plural="%d days", msgstr_plural={0: "%d 日"})
    path = catalogue(tmp_path / "b.po", days, plurals="nplurals=1; plural=0;")
    assert [(m.context, m.english) for m in extracted(path)] == [("n=1", "%d day"), ("n=2", "%d days")]


def test_every_form_of_every_language_of_django_has_a_count():
    """But those that only fractions take, for which Django has no message."""
    for path in gettext._catalogues("*", "po"):
        if path.parts[-5:-3] != ("conf", "locale"):
            continue
        rule = polib.pofile(str(path)).metadata.get("Plural-Forms")
        if rule is None:
            continue
        expression = rule.split("plural=", 1)[1].rstrip("; ")
        index = importlib.import_module("gettext").c2py(expression)
        assert {index(count) for count in gettext._COUNTS} == {index(n) for n in [*range(300), 1_000_000]}, path


def test_registering_reads_no_catalogue_and_can_be_repeated(cache, monkeypatch):
    monkeypatch.setattr(gettext, "_extract", None)
    for _ in range(2):
        importlib.reload(tasks)
        names = [name for name in seqio.TaskRegistry.names() if name.startswith("django_po_")]
    assert len(names) > 90 and {"django_po_de", "django_po_pt_BR", "django_po_zh_Hant"} <= set(names)
    for mixture in ("django_po", "django_po_european"):
        seqio.get_mixture_or_task(mixture)._check_compatible_features()
    assert not list(cache.iterdir())


def test_a_language_reads_as_translations_and_is_counted(cache):
    task = seqio.get_mixture_or_task("django_po_pl")
    texts = {}
    for split in gettext.SPLITS:
        examples = list(task.get_dataset(None, split, shuffle=False).as_numpy_iterator())
        assert len(examples) == task.num_input_examples(split)
        for example in examples:
            assert example["inputs"][-1] == example["targets"][-1] == 1
            prompt, target = (bytes((example[name][:-1] - 3).tolist()) for name in ("inputs", "targets"))
            assert prompt == example["inputs_pretokenized"] and target == example["targets_pretokenized"]
            assert texts.setdefault(prompt.decode(), target.decode()) == target.decode()
    assert texts["translate to Polish: Yes"] == "Tak"
    for count, english, polish in ((1, "hour", "godzina"), (2, "hours", "godziny"), (5, "hours", "godzin")):
        assert texts[f"translate to Polish [n={count}]: %(num)d {english}"] == f"%(num)d {polish}"
    assert len(list(cache.iterdir())) == 1
    assert task.metric_fns[0](["Tak"], ["Tak"]) == {"chrf": 100.0}


def test_a_message_is_in_one_split_in_all_languages(cache):
    sides = {}
    for locale in ("de", "fr", "zh_Hans", "ar"):
        for split in gettext.SPLITS:
            for message in gettext.messages(locale, split):
                assert sides.setdefault(message.key, split) == split
        share = len(gettext.messages(locale, "validation")) / len(gettext._messages(locale))
        assert 0.03 < share < 0.07
    assert gettext.split_of("Email address") == gettext.split_of("email address:")


def test_rates_follow_the_number_of_messages_tempered(cache):
    mixture = seqio.get_mixture_or_task("django_po_european")
    for task in seqio.get_subtasks(mixture):
        assert mixture.get_rate(task) == seqio.mixing_rate_num_examples(task, temperature=1 / 0.3)


def test_names_of_languages_are_djangos():
    names = [gettext.language(locale) for locale in ("pt_BR", "zh_Hans", "sr_Latn", "xx")]
    assert names == ["Brazilian Portuguese", "Simplified Chinese", "Serbian Latin", "xx"]


def test_the_extra_is_named_where_a_package_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "polib", None)
    with pytest.raises(ValueError, match=r"package 'polib'.*pip install 'meshway\[gettext\]'"):
        gettext._extract([])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"package 'django'.*pip install 'meshway\[gettext\]'"):
        gettext.locales()
