"""What QEMU has and a later issue brings: today it is refused, by its name (see `differences`).

These sequences differ by intent. They stand here so that what a refusal does is still run, and so
that whoever brings the feature finds its steps ready: then its line in `differences` goes."""

from ..table import disk, image, null, sequence


@sequence(disk("a"), disk("t"))
def commands_later(t):
    """Commands of qemu-storage-daemon that are not offered yet."""
    t("block-commit", device="nosuch")
    t("block-stream", device="nosuch")
    t("change-backing-file", device="nosuch", image_node_name="x", backing_file="y")
    t("block-set-write-threshold", node_name="nosuch", write_threshold=1)
    t("x-blockdev-change", parent="nosuch")
    t("x-blockdev-set-iothread", node_name="nosuch", iothread=None)
    t("x-blockdev-amend", job_id="j", node_name="nosuch", options={"driver": "qcow2"})
    t("chardev-remove", id="nosuch")


@sequence(image("x"), image("r", "raw"))
def drivers_later(t):
    """Drivers of QEMU that we do not have: refused by their names, at the root and below."""
    for driver in ("blklogwrites", "blkreplay", "blkverify", "bochs", "cloop", "compress",
                   "copy-on-read", "dmg", "luks", "null-aio", "parallels",
                   "preallocate", "qcow", "qed", "quorum", "vdi", "vhdx", "vmdk", "vpc"):
        t("blockdev-add", driver=driver, node_name="n")
    t("blockdev-add", driver="raw", node_name="n", file={"driver": "quorum"})


@sequence(null("n"))
def objects_later(t):
    """Objects without users yet."""
    for kind in ("tls-creds-x509", "tls-creds-psk", "tls-creds-anon", "authz-simple"):
        t("object-add", qom_type=kind, id="o")
        t("object-del", id="o")


IMAGES = (("extended-l2", {"extended_l2": "on"}), ("data-file", {"data_file": "x.raw"}),
          ("zstd", {"compression_type": "zstd"}), ("refcount-8", {"refcount_bits": 8}),
          ("refcount-64", {"refcount_bits": 64}), ("lazy", {"lazy_refcounts": "on"}))


@sequence(image("x"))
def images_later(t):
    """qcow2 features: each image is opened, or refused by the feature's name."""
    import subprocess
    for name, options in IMAGES:
        def make(where, name=name, options=options):
            argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o",
                    ",".join(f"{k}={v}" for k, v in options.items()), where / f"{name}.qcow2", "1M"]
            return subprocess.run(argv, check=False, cwd=where).returncode
        t.tool(f"make-{name}", make)
        t("blockdev-add", driver="qcow2", node_name="n",
          file={"driver": "file", "filename": f"$DIR/{name}.qcow2"})
        t.nodes()
        t("blockdev-del", node_name="n")

    def snapshot(where):
        return subprocess.run(["qemu-img", "snapshot", "-c", "s", where / "x.qcow2"],
                              check=False).returncode
    t.tool("make-snapshot", snapshot)
    t("blockdev-add", driver="qcow2", node_name="n", file={"driver": "file", "filename": "$DIR/x.qcow2"})
    t("query-named-block-nodes", flat=True, mask=["*date*"])
