"""qom-list, qom-get, qom-set: objects by their paths."""

from ..table import null, nbd_server, sequence

OBJECTS = ("--object", "iothread,id=io0", "--object", "secret,id=s0,data=abc",
           "--object", "throttle-group,id=tg0,x-bps-total=1000")


@sequence(*OBJECTS)
def qom_paths(t):
    """Where a path leads, and what is there."""
    for path in ("/objects", "/objects/", "//objects", "", "objects", "tg0", "/objects/tg0",
                 "/objects//tg0", "objects/tg0", "/objects/io0", "io0/", "/objects/s0",
                 "/objects/nosuch", "/nosuch", "nosuch", "/tg0", "/objects/tg0/type",
                 "/objects/tg0/limits", "/objects/objects", "/machine", "/"):
        t("qom-list", path=path)
    t("qom-list")
    t("qom-list", path=1)
    t("object-del", id="tg0")
    t("qom-list", path="/objects/tg0")
    t("qom-list", path="/objects")
    t("object-add", qom_type="iothread", id="objects")
    t("qom-list", path="objects")
    t("qom-get", path="objects", property="type")
    t("qom-set", path="objects", property="type", value=1)
    t("qom-list", path="/objects/objects")


@sequence(*OBJECTS)
def qom_values(t):
    """qom-get: what objects were made with, defaults, containers."""
    for path, names in (
            ("/objects/tg0", ("type", "limits", "x-bps-total", "x-iops-size", "x-iops-read-max-length",
                              "nosuch", "")),
            ("io0", ("type", "poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch",
                     "thread-pool-min", "thread-pool-max", "nosuch")),
            ("s0", ("type", "data", "loaded", "format", "keyid", "iv", "file", "nosuch")),
            ("/objects", ("type", "tg0", "io0", "nosuch")),
            ("/", ("type", "objects", "nosuch")),
            ("/nosuch", ("type",)), ("", ("type",))):
        for name in names:
            t("qom-get", path=path, property=name)
    t("qom-get", path="/objects/tg0")
    t("qom-get", property="x")
    t("qom-get", path=1, property="x")
    t("qom-get", path="io0", property=1)
    t("qom-get", path="io0", property="type", more=1)


@sequence(*OBJECTS)
def qom_set_limits(t):
    """qom-set of a throttle group: all limits at once, never one alone."""
    def set_to(name, value, path="/objects/tg0"):
        t("qom-set", path=path, property=name, value=value)
    t("qom-set")
    t("qom-set", path="tg0")
    t("qom-set", path="tg0", property="x")
    for value in (2000, -1, "x", True, None, {}, [], 1.5, 2**63):
        set_to("x-bps-total", value)
    for value in ({"bps-total": 5}, {"x": 5}, {"bps-total": "5"}, {"bps-total": -5},
                  {"bps-total": 10**15 + 1}, {"bps-total": 5, "bps-read": 4}, {"bps-read": 4},
                  {"bps-total": 0, "bps-read": 4}, 5, None, {}, [], "x", True,
                  {"bps-total-max-length": 2**33}, {"iops-size": 512}, {"iops-total-max": 3},
                  {"iops-total": 100, "iops-total-max": 200, "iops-total-max-length": 3,
                   "iops-size": 4096}):
        set_to("limits", value)
        t("qom-get", path="tg0", property="limits")
    set_to("type", "x")
    set_to("nosuch", 1)
    set_to("limits", {}, "/nosuch")
    t("qom-get", path="tg0", property="x-bps-read")


@sequence(*OBJECTS)
def qom_set_others(t):
    """qom-set of a secret, an iothread, a container."""
    for path, name, value in (
            ("s0", "data", "x"), ("s0", "loaded", True), ("s0", "loaded", 1), ("s0", "format", "raw"),
            ("s0", "format", "base64"), ("s0", "format", "x"), ("s0", "format", 1), ("s0", "keyid", "x"),
            ("s0", "iv", "y"), ("s0", "file", "/nosuch"), ("s0", "data", 1), ("s0", "data", None),
            ("s0", "nosuch", None), ("s0", "type", "x"),
            ("io0", "poll-max-ns", 5), ("io0", "poll-max-ns", -5), ("io0", "poll-max-ns", "x"),
            ("io0", "aio-max-batch", 7), ("io0", "thread-pool-min", 7), ("io0", "thread-pool-max", 9),
            ("io0", "thread-pool-max", -1), ("io0", "poll-grow", 2**40), ("io0", "type", "x"),
            ("/objects", "tg0", "x"), ("/objects", "type", "x"), ("/objects", "nosuch", "x"),
            ("/", "objects", 1), ("/nosuch", "x", 1)):
        t("qom-set", path=path, property=name, value=value)
    for path, names in (("s0", ("data", "file", "keyid", "iv", "format")),
                        ("io0", ("poll-max-ns", "aio-max-batch", "thread-pool-min",
                                 "thread-pool-max", "poll-grow"))):
        for name in names:
            t("qom-get", path=path, property=name)
    for more in ({"thread_pool_min": 65}, {"thread_pool_max": 0}, {"thread_pool_min": 2, "thread_pool_max": 1},
                 {"thread_pool_min": 64}):
        t("object-add", qom_type="iothread", id="io1", **more)


@sequence("--object", "throttle-group,id=g,x-bps-write=1", null("n"),
          "--blockdev", "throttle,node-name=a,throttle-group=g,file=n", nbd_server("a"))
def qom_set_lets_a_guest_go(t):
    """Limits that are lifted hold nobody any longer."""
    t("qom-set", path="g", property="limits", value={"bps-write": 0})
    t.write("a", 0, 65536)
    t.write("a", 0, 65536)
    t("qom-set", path="g", property="limits", value={"bps-write": 1 << 30})
    t.write("a", 0, 65536)
    t("object-del", id="g")
