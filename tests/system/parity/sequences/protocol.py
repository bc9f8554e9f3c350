"""The monitor itself: negotiation, the shape of messages, ids, out-of-band, broken JSON."""

from ..table import disk, sequence

NEGOTIATE = '{"execute": "qmp_capabilities"}'


@sequence(start=False)
def negotiation(t):
    """Before qmp_capabilities nothing else is there; after it, qmp_capabilities is not."""
    t.start("--blockdev", "null-co,node-name=n", negotiate=False)
    t.raw("", label="greeting")
    t.raw('{"execute": "query-version"}')
    t.raw('{"execute": "query-block", "id": 1}')
    t.raw('{"execute": "nosuch"}')
    t.raw('{"execute": "qmp_capabilities", "arguments": {"nosuch": 1}}')
    t.raw('{"execute": "qmp_capabilities", "arguments": {"enable": "oob"}}')
    t.raw('{"execute": "qmp_capabilities", "arguments": {"enable": ["nosuch"]}}')
    t.raw('{"execute": "qmp_capabilities", "arguments": {"enable": [1]}}')
    t.raw('{"execute": "qmp_capabilities", "arguments": {"enable": {}}}')
    t.raw('{"exec-oob": "qmp_capabilities"}')
    t.raw('{"execute": "qmp_capabilities", "arguments": {"enable": []}}')
    t.raw(NEGOTIATE)
    t.raw('{"exec-oob": "query-version"}')
    t.raw('{"execute": "query-version"}')


@sequence(start=False)
def negotiation_oob(t):
    """With the capability oob: exec-oob for the commands that allow it, refused for others."""
    t.start("--blockdev", "null-co,node-name=n", negotiate=False)
    t.raw("", label="greeting")
    t.raw('{"execute": "qmp_capabilities", "arguments": {"enable": ["oob", "oob"]}}')
    t.raw('{"exec-oob": "query-version", "id": 1}')
    t.raw('{"exec-oob": "nosuch", "id": 2}')
    t.raw('{"exec-oob": "qmp_capabilities", "id": 3}')
    t.raw('{"exec-oob": "quit", "id": 4}')
    t.raw('{"exec-oob": "query-version"}')
    t.raw('{"exec-oob": "query-version", "execute": "query-version", "id": 5}')
    t.raw('{"exec-oob": 1, "id": 6}')
    t.raw('{"execute": "query-version", "id": 7}')
    t.raw('{"execute": "query-version"}')


@sequence()
def ids(t):
    """The id comes back as it was, whatever it is."""
    for ident in ('1', '0', '-1', '"x"', '""', 'null', 'true', '[]', '[1, {"a": null}]',
                  '{"id": {"id": 2}}', '1.5', '18446744073709551615', '-9223372036854775808',
                  '"\\u00e4\\n\\u0000"', '"\\ud83d\\ude00"'):
        t.raw('{"execute": "query-block-jobs", "id": %s}' % ident, label="id")
        t.raw('{"execute": "nosuch", "id": %s}' % ident, label="id-error")
    t.raw('{"execute": "query-block-jobs"}')


@sequence()
def messages(t):
    """Messages that are JSON but not a command."""
    for text in ('[]', '1', '"x"', 'null', 'true', '1.5', '{}', '{"execute": 1}',
                 '{"execute": null}', '{"execute": []}', '{"execute": ""}', '{"execute": " query-version"}',
                 '{"Execute": "query-version"}', '{"execute": "query-version", "more": 1}',
                 '{"execute": "query-version", "arguments": []}',
                 '{"execute": "query-version", "arguments": null}',
                 '{"execute": "query-version", "arguments": "x"}',
                 '{"execute": "query-version", "arguments": 1}',
                 '{"execute": "query-version", "arguments": {"x": 1}}',
                 '{"execute": "query-version", "arguments": {}}',
                 '{"arguments": {}}', '{"id": 7}', '{"id": 8, "arguments": {}}',
                 '{"execute": "query-version", "execute": "query-version"}',
                 '{"execute": "nosuch-command", "arguments": {"a": 1}}',
                 '{"execute": "block-dirty-bitmap-add", "arguments": {"node": "n", "node": "n"}}'):
        t.raw(text + "\n", label="message")


@sequence(disk("a"))
def json_dialect(t):
    """What QEMU takes beyond, and of, JSON: single quotes, escapes, white space, no newline between."""
    t.raw("{'execute': 'query-block-jobs'}")
    t.raw("{'execute': \"query-block-jobs\", 'id': 'a\\'b\"c'}")
    t.raw('{"execute": "query-block-jobs", "id": "a\'b\\"c\\/\\\\\\b\\f\\n\\r\\t"}')
    t.raw('  \t\r\n{\n"execute"\t:\r\n "query-block-jobs" } ')
    t.raw('{"execute":"query-block-jobs","id":1}{"execute":"query-block-jobs","id":2}', answers=2)
    t.raw('{"execute":"query-block-jobs","id":1}\n\n\n{"execute":"query-block-jobs","id":2}', answers=2)
    t.raw('{"execute":"query-block-jobs","id":"\u00e4\u2202\U0001f600"}')
    t.raw("{'execute': 'block-dirty-bitmap-add', 'arguments': {'node': 'a', 'name': 'q'}}")
    t.raw('{"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "u\\u00e4"}}')
    for number in ('65536', '65536.0', '6.5536e4', '1e400', '18446744073709551615',
                   '18446744073709551616', '-1', '-9223372036854775808', '-9223372036854775809',
                   '9223372036854775807', '9223372036854775808',
                   '123456789012345678901234567890', '0.5', '-0'):
        t.raw('{"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "n", '
              '"granularity": %s}}' % number, label="number")
        t.raw('{"execute": "block_resize", "arguments": {"node-name": "a", "size": "x", "device": %s}}'
              % number, label="number-for-string")
    t.raw('{"execute": "block-job-set-speed", "arguments": {"device": "j", "speed": 9223372036854775808}}')
    t.raw('{"execute": "block-job-set-speed", "arguments": {"device": "j", "speed": -9223372036854775808}}')
    t.raw('{"execute": "block-job-set-speed", "arguments": {"device": "j", "speed": 9223372036854775807}}')


@sequence()
def json_syntax_errors(t):
    """Broken JSON: one error, then the connection goes on."""
    for text in ('{"execute" "query-block-jobs"}', '{"execute": query}', "{,}", '{"a": 1,}',
                 '[1 2]', '{1: 2}', '}', ']', ':', '01', '{"a": "\\q"}', '{"a": "\\u12"}', "{'a': .5}",
                 '{"a": 1.}', '{"a": +1}', '{"a": nul}', "{\"a\": \"\n\"}", "{\"a\": \"\x01\"}",
                 '"\\ud800"'):
        t.broken(text + "\n")


@sequence()
def unknown_commands(t):
    """Commands that are not there, and names that are nearly there."""
    for name in ("nosuch", "", "QUERY-BLOCK", "query_block", "query-block ", "quit2", "device_add",
                 "query-status", "query-name", "stop", "cont", "human-monitor-command", "x" * 300):
        t(name)
        t(name, {"a": 1})


@sequence()
def queries_take_no_arguments(t):
    """Commands without arguments refuse any, by its name."""
    for name in ("query-version", "query-commands", "query-block", "query-block-jobs", "query-jobs",
                 "query-block-exports", "nbd-server-stop", "quit"):
        t(name, {"nosuch": 1})
        t(name, [])
    t("query-named-block-nodes", nosuch=1)
    t("query-named-block-nodes", flat=1)
    t("query-named-block-nodes", flat="true")
    t("query-named-block-nodes", flat=None)
    t("query-blockstats", query_nodes="x")
    t("query-blockstats", query_nodes=0)
    t("query-blockstats", nosuch=False)
    t("query-qmp-schema", nosuch=False)
    t("query-version")
    t("query-jobs")
    t("query-block-jobs")
    t("query-block")
    t("query-blockstats")
    t("query-block-exports")
    t.nodes()


@sequence(disk("a"))
def quit_ends_it(t):
    """quit answers, then the program ends by itself with status 0."""
    t("quit", {"now": True})
    t.finish("quit")
    t.start()
    t.finish("term")
    t.start()
    t.finish("int")


@sequence()
def one_monitor_twice(t):
    """Many commands sent at once are answered in their order."""
    t.raw("".join('{"execute": "query-block-jobs", "id": %d}' % i for i in range(6)), answers=6)
    t.raw('{"execute": "query-block-jobs", "id": 1}{"execute": "nosuch", "id": 2}'
          '{"execute": "query-jobs", "id": 3}', answers=3)
