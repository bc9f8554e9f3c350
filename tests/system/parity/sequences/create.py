"""blockdev-create: files and qcow2 images, every option, good and bad."""

from ..table import disk, image, sequence

CREATE = "blockdev-create"


def create(t, options, job="c"):
    """A creation that may start: its job's end is looked at and dismissed."""
    t(CREATE, job_id=job, options=options)
    t.wait_job(job)
    t("query-jobs")
    t("job-dismiss", id=job)


@sequence()
def create_arguments(t):
    """Arguments that are refused before there is a job."""
    t(CREATE)
    t(CREATE, job_id="c")
    t(CREATE, options={"driver": "file", "filename": "$DIR/f", "size": 1})
    t(CREATE, job_id="", options={"driver": "file", "filename": "$DIR/f", "size": 1})
    t(CREATE, job_id="1", options={"driver": "file", "filename": "$DIR/f", "size": 1})
    t(CREATE, job_id=1, options={"driver": "file", "filename": "$DIR/f", "size": 1})
    for options in ({}, [], 1, {"driver": "nosuch"}, {"driver": "raw"}, {"driver": "null-co"},
                    {"driver": "file"}, {"driver": "file", "filename": "$DIR/f"},
                    {"driver": "file", "size": 1}, {"driver": "file", "filename": 1, "size": 1},
                    {"driver": "file", "filename": "$DIR/f", "size": "1"},
                    {"driver": "file", "filename": "$DIR/f", "size": 1, "nosuch": 1},
                    {"driver": "file", "filename": "$DIR/f", "size": 1, "preallocation": "nosuch"},
                    {"driver": "file", "filename": "$DIR/f", "size": 1, "nocow": 1},
                    {"driver": "qcow2"}, {"driver": "qcow2", "file": "nosuch"},
                    {"driver": "qcow2", "size": 1 << 20},
                    {"driver": "qcow2", "file": "nosuch", "size": "1"},
                    {"driver": "qcow2", "file": "nosuch", "size": 1 << 20, "version": "v4"},
                    {"driver": "qcow2", "file": "nosuch", "size": 1 << 20, "cluster-size": "64k"},
                    {"driver": "qcow2", "file": "nosuch", "size": 1 << 20, "nosuch": 1},
                    {"driver": "qcow2", "file": "nosuch", "size": 1 << 20, "preallocation": 1},
                    {"driver": "qcow2", "file": "nosuch", "size": 1 << 20, "backing-fmt": "nosuch"},
                    {"driver": "qcow2", "file": "nosuch", "size": 1 << 20, "compression-type": "nosuch"}):
        t(CREATE, job_id="c", options=options)
    t("query-jobs")


@sequence(image("old", "raw", data="write -P 1 0 1M"))
def create_file(t):
    """Files: sizes, preallocation, an existing one, a directory that is not there."""
    for options in ({"filename": "$DIR/f0", "size": 0}, {"filename": "$DIR/f1", "size": 512},
                    {"filename": "$DIR/f2", "size": 1000}, {"filename": "$DIR/f3", "size": 4 << 20},
                    {"filename": "$DIR/old.raw", "size": 2 << 20},
                    {"filename": "$DIR/f4", "size": 1 << 20, "preallocation": "off"},
                    {"filename": "$DIR/f5", "size": 1 << 20, "preallocation": "full"},
                    {"filename": "$DIR/f6", "size": 1 << 20, "preallocation": "falloc"},
                    {"filename": "$DIR/f7", "size": 1 << 20, "preallocation": "metadata"},
                    {"filename": "$DIR/f8", "size": (1 << 63) - 1},
                    {"filename": "$DIR/f9", "size": 1 << 63},
                    {"filename": "$DIR/nosuch/f", "size": 1}, {"filename": "$DIR", "size": 1},
                    {"filename": "", "size": 1}, {"filename": "$DIR/f1", "size": 512, "nocow": False},
                    {"filename": "$DIR/f10", "size": -1}):
        create(t, {"driver": "file", **options})

    def sizes(where):
        return {p.name: p.stat().st_size for p in sorted(where.iterdir())
                if p.name in ("f0", "f1", "f2", "f3", "f4", "f5", "f6", "old.raw")}
    t.tool("sizes", sizes)


@sequence(image("f", "raw", size="0"),
          "--blockdev", "file,node-name=f,filename=$DIR/f.raw")
def create_qcow2_values(t):
    """qcow2 over a file node: sizes, versions, cluster sizes, refcount widths."""
    go = {"driver": "qcow2", "file": "f", "size": 4 << 20}
    for more in ({"size": 0}, {"size": 512}, {"size": 1000}, {"size": 1 << 40}, {"size": (1 << 63) - 512},
                 {"size": 1 << 63}, {"version": "v2"}, {"version": "v3"}, {"cluster-size": 512},
                 {"cluster-size": 4096}, {"cluster-size": 2 << 20}, {"cluster-size": 256},
                 {"cluster-size": 4 << 20}, {"cluster-size": 1000}, {"cluster-size": 0},
                 {"refcount-bits": 0}, {"refcount-bits": 3}, {"refcount-bits": 16},
                 {"refcount-bits": 128}, {"version": "v2", "refcount-bits": 8},
                 {"lazy-refcounts": False}, {"version": "v2", "lazy-refcounts": True},
                 {"preallocation": "off"}, {"preallocation": "metadata"},
                 {"compression-type": "zlib"}, {"version": "v2", "compression-type": "zstd"},
                 {"extended-l2": False},
                 {"backing-fmt": "qcow2"}, {"backing-file": "nosuch.qcow2"},
                 {"backing-file": "x.qcow2", "backing-fmt": "qcow2"},
                 {"backing-file": "x" * 1023, "backing-fmt": "raw"},
                 {"backing-file": "x" * 1024, "backing-fmt": "raw"}):
        create(t, {**go, **more})
    t("job-dismiss", id="c")


@sequence(image("f", "raw", size="0"),
          "--blockdev", "file,node-name=f,filename=$DIR/f.raw")
def create_qcow2_later(t):
    """Options of images that a later issue makes: each is refused by its name."""
    go = {"driver": "qcow2", "file": "f", "size": 4 << 20}
    for job, more in (("c1", {"data-file-raw": True}), ("c2", {"data-file": "nosuch"}),
                      ("c3", {"extended-l2": True}), ("c4", {"encrypt": {"format": "nosuch"}})):
        t(CREATE, job_id=job, options={**go, **more})
        if job != "c4":
            t.wait_job(job)


@sequence(image("f", "raw", size="0"),
          "--blockdev", "file,node-name=f,filename=$DIR/f.raw", disk("q"),
          mask=["return[*].image.virtual-size"])
def create_qcow2_then_use(t):
    """What was created is a disk: opened, listed, checked; a node in use is refused."""
    create(t, {"driver": "qcow2", "file": "f", "size": 4 << 20, "version": "v3", "cluster-size": 65536})
    t("blockdev-add", driver="qcow2", node_name="new", file="f")
    t.nodes()
    t("block-dirty-bitmap-add", node="new", name="b", persistent=True)
    t(CREATE, job_id="d", options={"driver": "qcow2", "file": "f", "size": 1 << 20})
    t.wait_job("d")
    t("query-jobs")
    t("job-dismiss", id="d")
    create(t, {"driver": "qcow2", "file": "q", "size": 1 << 20})
    t("blockdev-del", node_name="new")
    create(t, {"driver": "qcow2", "file": {"driver": "file", "filename": "$DIR/f.raw"}, "size": 1 << 20}, job="e")
    t.nodes()
    t.finish()
    t.check("f.raw")

    def info(where):
        import json
        import subprocess
        done = subprocess.run(["qemu-img", "info", "--output=json", where / "f.raw"],
                              capture_output=True, check=True)
        found = json.loads(done.stdout)
        return [found["format"], found["virtual-size"], found["cluster-size"], found["format-specific"]]
    t.tool("info", info)


@sequence(image("base", data="write -P 1 0 1M"), image("f", "raw", size="0"),
          "--blockdev", "file,node-name=f,filename=$DIR/f.raw",
          mask=["return[*].image.virtual-size"])
def create_qcow2_with_backing(t):
    """An overlay as libvirt makes it: created with a backing file, opened over a node."""
    create(t, {"driver": "qcow2", "file": "f", "size": 4 << 20, "backing-file": "$DIR/base.qcow2",
               "backing-fmt": "qcow2"})
    t("blockdev-add", driver="qcow2", node_name="base",
      file={"driver": "file", "filename": "$DIR/base.qcow2"})
    t("blockdev-add", driver="qcow2", node_name="over", file="f", backing="base")
    t.nodes()
    t("blockdev-del", node_name="over")
    t("blockdev-del", node_name="base")
    t("blockdev-add", driver="qcow2", node_name="over", file="f")
    t.nodes()
    t.finish()
    t.content("f.raw")
