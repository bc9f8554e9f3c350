"""The comparison itself: it must see what differs, and `differences` must hide only what it names."""

from . import compare, normal
from .table import Record, Step, all_sequences, count_steps


def record(*results, events=()):
    return Record([Step(f"cmd#{n}", None, r) for n, r in enumerate(results, 1)], dict(events))


def found(theirs, ours):
    return [(d.step, d.path, d.kind) for d in compare.compare_records("seq", theirs, ours)]


def test_equal_records_do_not_differ():
    one = record({"return": {"a": 1, "b": [1, 2]}})
    two = record({"return": {"b": [1, 2], "a": 1}})
    assert found(one, two) == []


def test_each_kind_of_difference_is_seen():
    assert found(record({"return": 1}), record({"return": 2})) == [("cmd#1", "return", "value")]
    assert found(record({"return": 1}), record({"return": True})) == [("cmd#1", "return", "value")]
    assert found(record({"return": {"a": 1}}), record({"return": {"b": 1}})) == [
        ("cmd#1", "return.a", "missing"), ("cmd#1", "return.b", "extra")]
    assert found(record({"return": {}}), record({"error": {}})) == [("cmd#1", "", "outcome")]
    assert found(record({"return": {}}), record({"TIMEOUT": True})) == [("cmd#1", "", "outcome")]
    assert found(record({}, {}), record({})) == [("cmd#2", "", "missing")]
    assert found(record({"return": [1, 2]}), record({"return": [1]})) == [
        ("cmd#1", "return[1]", "missing")]


def test_lists_of_named_things_are_compared_by_name_and_order():
    a, b = {"name": "a", "n": 1}, {"name": "b", "n": 1}
    assert found(record({"return": [a, b]}), record({"return": [a]})) == [
        ("cmd#1", "return[].b", "missing")]
    assert found(record({"return": [a, b]}), record({"return": [b, a]})) == [
        ("cmd#1", "return[order]", "value")]


def test_events_are_laid_side_by_side():
    def events(*names):
        return {"j": [(name, {}) for name in names]}
    theirs = record(events=events("running", "pending", "null"))
    ours = record(events=events("running", "null"))
    assert found(theirs, ours) == [("events/j", "pending", "missing")]
    assert found(ours, theirs) == [("events/j", "pending", "extra")]


def test_a_listed_difference_is_allowed_and_no_other():
    line = compare.Wanted(1, "s* cmd#1 return.a value because")
    wanted = [line]
    differences = compare.compare_records("seq", record({"return": {"a": 1, "b": 1}}),
                                          record({"return": {"a": 2, "b": 2}}))
    assert [d.path for d in compare.unlisted(differences, wanted)] == ["return.b"]
    assert line.used


def test_a_line_that_nothing_needs_is_seen_in_a_whole_run():
    used, idle = (compare.Wanted(n, f"seq cmd#{n} return value because") for n in (1, 2))
    compare.unlisted(compare.compare_records("seq", record({"return": 1}), record({"return": 2})),
                     [used, idle])
    assert compare.unused([used, idle], {"seq", "b"}, {"seq", "b"}) == [idle]
    assert compare.unused([used], {"seq", "b"}, {"seq", "b"}) == []
    assert compare.unused([used, idle], {"seq"}, {"seq", "b"}) is None


def test_pauses_of_the_daemon_are_left_out_and_those_of_a_user_kept():
    def status(*names):
        return [(f"JOB_STATUS_CHANGE:{n}", {}) for n in names]
    start = status("created", "running", "paused", "running")
    pause = status("paused", "running")
    left = normal.without_pauses(start + pause, all_of_them=False)
    assert left == status("created", "running") + pause
    assert normal.without_pauses(start + pause, all_of_them=True) == status("created", "running")


def test_the_table_is_as_large_as_promised():
    assert sum(map(count_steps, all_sequences())) >= 7000


def test_a_mask_names_an_event_s_member():
    scrub = normal.Scrubber("/nowhere", "tidemarkd", None, ("BLOCK_JOB_CANCELLED.offset",))
    events = [{"event": "BLOCK_JOB_CANCELLED", "data": {"device": "j", "offset": 7, "len": 9}}]
    assert normal.events_by_subject(events, scrub, False) == {
        "j": [("BLOCK_JOB_CANCELLED", {"device": "j", "offset": "#", "len": 9})]}
