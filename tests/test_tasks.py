"""Label lists of every reference task, the grammar of names, and what a wrong name gets."""

import json

import pytest

from tasks import FAMILIES, Family, check_step, get_task, parse_task
from tests.trees import GOLDEN
from utils.errors import UserError

REFERENCE = json.loads((GOLDEN / "tasks.json").read_text())
REFERENCE_TASKS = [
    (dataset, name) for dataset, tasks in REFERENCE["reference_tasks"].items() for name in tasks
]


@pytest.mark.parametrize(("dataset", "name"), REFERENCE_TASKS)
def test_labels_of_every_reference_task(dataset, name):
    expected = REFERENCE["reference_tasks"][dataset][name]
    task = get_task(dataset, name)
    assert {str(t): list(task.new(t)) for t in range(task.num_steps)} == expected


def test_class_orders():
    for dataset, orders in REFERENCE["class_orders"].items():
        assert {k: list(v) for k, v in FAMILIES[dataset].orders.items()} == orders


@pytest.mark.parametrize(
    ("dataset", "spelling", "canonical"),
    [
        ("voc", "15-1", "15-5s"),
        ("voc", "15-5s", "15-5s"),
        ("voc", "10-5-5", "10-5"),
        ("voc", "10-5", "10-5"),
        ("voc", "19-1b", "19-1b"),
        ("ade", "50-50", "50"),
        ("ade", "50", "50"),
        ("ade", "50-50c", "50c"),
        ("ade", "100-10b", "100-10b"),
        ("ade", "offline", "offline"),
    ],
)
def test_canonical_names_and_aliases(dataset, spelling, canonical):
    task = get_task(dataset, spelling)
    assert task.name == canonical
    assert get_task(dataset, canonical) == task


def test_listed_names_are_canonical():
    for dataset, family in FAMILIES.items():
        assert [get_task(dataset, name).name for name in family.names] == list(family.names)


@pytest.mark.parametrize(
    ("name", "sizes"), [("10-1", [11] + [1] * 10), ("5-3", [6] + [3] * 5), ("12-5", [13, 5, 3])]
)
def test_grammar_cuts_until_no_class_is_left(name, sizes):
    task = get_task("voc", name)
    assert task.classes_per_step(task.num_steps - 1) == sizes
    assert sorted(task.seen(task.num_steps - 1)) == list(range(21))


def test_old_new_and_seen_follow_the_head():
    task = get_task("ade", "100-10b")
    assert task.old(0) == ()
    assert task.old(2) == task.new(0) + task.new(1)
    assert task.seen(2) == task.old(2) + task.new(2)
    assert task.classes_per_step(2) == [101, 10, 10]
    assert task.new(1) == (11, 16, 50, 64, 66, 73, 89, 92, 145, 146)


def test_any_number_of_classes_uses_the_grammar():
    task = parse_task("folder", "4-3", Family(num_classes=12))
    assert task.steps == ((0, 1, 2, 3, 4), (5, 6, 7), (8, 9, 10), (11, 12))


@pytest.mark.parametrize(
    "name", ["", "foo", "0-5", "15-0", "20-1", "15", "15-5-5", "-1", "15-5c", "offlineb", "15-٥"]
)
def test_unknown_name_answers_with_names_and_grammar(name):
    with pytest.raises(UserError, match="unknown task .*19-1b, 15-5, 15-5s.*B-I = B base classes"):
        get_task("voc", name)


@pytest.mark.parametrize(
    ("dataset", "name", "other"),
    [
        ("voc", "100-50", "ade"),
        ("voc", "50", "ade"),
        ("voc", "50c", "ade"),
        ("ade", "15-5", "voc"),
        ("ade", "15-1", "voc"),
        ("ade", "19-1b", "voc"),
    ],
)
def test_task_of_the_other_dataset_says_so(dataset, name, other):
    with pytest.raises(UserError, match=f"task {name} belongs to dataset {other}, not to"):
        get_task(dataset, name)


def test_unknown_dataset():
    with pytest.raises(UserError, match="'city': choose one of voc, ade"):
        get_task("city", "15-5")


def test_step_range():
    task = get_task("voc", "15-5")
    check_step(task, 0)
    check_step(task, 1)
    for step in (-1, 2):
        with pytest.raises(UserError, match=f"no step {step}: use --step 0 to 1"):
            check_step(task, step)
