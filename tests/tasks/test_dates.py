import datetime
import importlib

import pytest

from meshway.framework.data.seqio_adapter import import_seqio

seqio = import_seqio()

from meshway.tasks import dates, quickstart  # noqa: E402

FRIDAY = datetime.date(1987, 7, 3)
WRITTEN = [  # by hand, in the order of PATTERNS
    "Friday, 3rd of July 1987",
    "Friday, 3 July 1987",
    "Friday 3 July 1987",
    "Friday, July 3, 1987",
    "Friday, July 3rd, 1987",
    "Fri, 03 Jul 1987",
    "Fri Jul 3 1987",
    "Fri 3 Jul 1987",
    "July 3, 1987",
    "July 3rd, 1987",
    "July 3 1987",
    "Jul 3, 1987",
    "Jul. 3, 1987",
    "Jul 03 1987",
    "3 July 1987",
    "3 Jul 1987",
    "3. July 1987",
    "3rd of July 1987",
    "3rd of July, 1987",
    "3rd July 1987",
    "the 3rd of July, 1987",
    "03-Jul-1987",
    "1987 July 3",
    "1987, July 3rd",
    "1987-Jul-03",
    "1987/07/03",
    "1987.07.03",
    "19870703",
    "1987-07-03",
    "1987-7-3",
    "7/3/1987",
    "07/03/1987",
    "3.7.1987",
    "03.07.1987",
]


def test_each_pattern_writes_a_date_as_a_person_would():
    assert [dates.in_pattern(FRIDAY, pattern) for pattern in dates.PATTERNS] == WRITTEN


@pytest.mark.parametrize("day, nth", [(1, "1st"), (2, "2nd"), (11, "11th"), (12, "12th"), (13, "13th"), (22, "22nd")])
def test_days_have_their_suffix(day, nth):
    assert dates.in_pattern(datetime.date(2001, 8, day), "{nth}") == nth


def test_no_text_means_two_dates():
    """Whatever the pattern and the case: so a reader can know which number is the day."""
    read: dict[str, datetime.date] = {}
    for year in (1901, 1910, 2012):
        for days in range(365):
            date = datetime.date(year, 1, 1) + datetime.timedelta(days)
            for pattern in dates.PATTERNS:
                for case in dict.fromkeys(dates.CASES):
                    text = case(dates.in_pattern(date, pattern))
                    assert read.setdefault(text, date) == date, text


def test_validation_dates_are_held_out_in_every_format():
    train, validation = map(dates.dates, dates.SPLITS)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == [dates.FIRST + datetime.timedelta(n) for n in range(73_049)]
    assert 200 < len(validation) < 600
    assert {date.month for date in validation} == set(range(1, 13))


def test_every_pattern_and_case_is_written_and_fits_the_recipe():
    texts = {date: dates.written(date) for date in dates.dates("train")}
    assert max(map(len, texts.values())) < 64
    some = list(texts.items())[:3000]
    assert {
        next(i for i, p in enumerate(dates.PATTERNS) if dates.in_pattern(date, p).lower() == text.lower())
        for date, text in some
    } >= set(range(len(dates.PATTERNS))) - {0}
    assert any(text.isupper() for _, text in some) and any(text.islower() for _, text in some)


def test_the_task_is_bytes_in_and_out_and_scored_by_exact_match():
    task = seqio.get_mixture_or_task("dates")
    examples = list(task.get_dataset(None, "validation", shuffle=False).as_numpy_iterator())
    assert len(examples) == task.num_input_examples("validation")
    texts = [[bytes((e[name][:-1] - 3).tolist()).decode() for name in ("inputs", "targets")] for e in examples]
    assert sorted(text for _, text in texts) == [date.isoformat() for date in dates.dates("validation")]
    assert all(dates.written(datetime.date.fromisoformat(iso)) == text for text, iso in texts)
    assert {int(e["targets"][-1]) for e in examples} == {1}
    (metric,) = task.metric_fns
    assert metric(["1987-07-03", "2000-01-01"], ["1987-07-03", "2000-01-10"]) == {"exact_match": 50.0}


def test_the_quickstart_mixes_dates_with_text_of_the_same_vocabulary():
    importlib.reload(quickstart)  # another test may have registered its sources anew
    mixture = seqio.get_mixture_or_task("quickstart_mix")
    mixture._check_compatible_features()
    assert {task.name: mixture.get_rate(task) for task in seqio.get_subtasks(mixture)} == quickstart.RATES
    assert all(task.supports_caching for task in seqio.get_subtasks(mixture))
