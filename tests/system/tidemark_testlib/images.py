"""Images made, changed, and judged by QEMU's own tools: witnesses that we did not write."""

import hashlib
import json
import subprocess

from .timing import wait_until


class ToolError(Exception):
    """A witness said no: .status, .stdout, .stderr."""

    def __init__(self, argv, done):
        out = done.stdout.decode(errors="replace")
        err = done.stderr.decode(errors="replace")
        super().__init__(f"{' '.join(argv)}: status {done.returncode}\n{out}{err}")
        self.status, self.stdout, self.stderr = done.returncode, out, err


def run_tool(*argv, check=True, timeout=120):
    argv = [str(a) for a in argv]
    done = subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout,
                          check=False)
    if check and done.returncode != 0:
        raise ToolError(argv, done)
    return done


def qemu_img(*argv, check=True):
    """Runs qemu-img; its stdout as text."""
    return run_tool("qemu-img", *argv, check=check).stdout.decode(errors="replace")


def qemu_io(image, *commands, fmt=None, check=True, image_opts=None, force_share=False):
    """Runs qemu-io's COMMANDS on IMAGE (a path, or an NBD URI with fmt="raw")."""
    argv = ["qemu-io"]
    if force_share:
        argv.append("-U")
    if image_opts:
        argv += ["--image-opts", image_opts]
    elif fmt:
        argv += ["-f", fmt]
    for command in commands:
        argv += ["-c", command]
    done = run_tool(*argv, *([] if image_opts else [image]), check=False)
    text = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
    if check and (done.returncode != 0 or "failed" in text):
        raise ToolError(argv, done)
    return text


def wait_for_locks(*images):
    """Until nobody has them open for writing. After a kill the kernel may need a moment to end what
    was under way, and to let go of the locks."""
    for image in images:
        wait_until(lambda: b'" lock' not in run_tool("qemu-img", "info", image, check=False).stderr)


def create_image(path, fmt="qcow2", size="64M", **options):
    """An empty image: create_image(p, "qcow2", "1G", cluster_size="2M", backing_file=b)."""
    backing = options.pop("backing_file", None)
    argv = ["create", "-q", "-f", fmt]
    if backing is not None:
        argv += ["-b", backing, "-F", options.pop("backing_fmt")]
    if options:
        argv += ["-o", ",".join(f"{k}={v}" for k, v in options.items())]
    qemu_img(*argv, path, *([] if size is None else [size]))
    return path


def image_info(path):
    return json.loads(qemu_img("info", "-U", "--output=json", path))


def check_image(path, fmt="qcow2"):
    """qemu-img check's verdict as a dict: check-errors, leaks, corruptions (0 where absent)."""
    done = run_tool("qemu-img", "check", "-U", "-f", fmt, "--output=json", path, check=False)
    if done.returncode not in (0, 2, 3):
        raise ToolError(["qemu-img", "check", str(path)], done)
    verdict = json.loads(done.stdout)
    return {"leaks": 0, "corruptions": 0, "check-errors": 0, **verdict}


def map_image(path, fmt=None):
    return json.loads(qemu_img("map", "-U", "--output=json", *(["-f", fmt] if fmt else []), path))


def compare(a, b, fmt_a="qcow2", fmt_b="qcow2"):
    """True when qemu-img finds the same content (a longer tail of zeroes counts as the same)."""
    done = run_tool("qemu-img", "compare", "-U", "-q", "-f", fmt_a, "-F", fmt_b, a, b, check=False)
    if done.returncode > 1:
        raise ToolError(["qemu-img", "compare", str(a), str(b)], done)
    return done.returncode == 0


def sha256_of(path, fmt="qcow2"):
    """SHA-256 of what a guest would read."""
    digest = hashlib.sha256()
    with subprocess.Popen(["qemu-img", "convert", "-U", "-f", fmt, "-O", "raw", str(path),
                           "/dev/stdout"], stdout=subprocess.PIPE) as convert:
        for piece in iter(lambda: convert.stdout.read(1 << 20), b""):
            digest.update(piece)
    if convert.returncode != 0:
        # Not every qemu-img writes to a pipe: convert to a file beside it.
        raw = f"{path}.sha256.raw"
        qemu_img("convert", "-U", "-f", fmt, "-O", "raw", path, raw)
        digest = hashlib.sha256()
        with open(raw, "rb") as file:
            for piece in iter(lambda: file.read(1 << 20), b""):
                digest.update(piece)
        subprocess.run(["rm", "-f", raw], check=True)
    return digest.hexdigest()
