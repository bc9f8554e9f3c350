"""At the end of a run: the lines of `differences` that no longer occur."""

from .table import all_sequences


def pytest_terminal_summary(terminalreporter, config):
    wanted = getattr(config, "parity_wanted", None)
    seen = getattr(config, "parity_seen", set())
    if not wanted or seen != {s.name for s in all_sequences()}:
        return      # only a whole run can tell
    for line in wanted:
        if not line.used:
            terminalreporter.write_line(
                f"parity/differences:{line.number}: no longer occurs: {line.line}")
