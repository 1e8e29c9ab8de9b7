"""Makes the wheel: a PEP 517 backend that needs nothing but Python, and a program for `make wheel`.

    python3 backend.py LIBRARY DIRECTORY     a wheel in DIRECTORY that carries LIBRARY
"""

import base64
import glob
import hashlib
import os
import platform
import re
import subprocess
import sys
import zipfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.abspath(os.path.join(HERE, "..", ".."))
NAME = "psoup"
LIBRARY = "build/gcc-release/wheel/libpsoup.so"
LINKED = ("jansson", "pcre2", "zstd", "yaml", "xxhash", "md")  # whose licences go along

METADATA = """Metadata-Version: 2.1
Name: psoup
Version: %s
Summary: Personal language models from one base
License-File: LICENSE
Requires-Python: >=3.9
Provides-Extra: numpy
Requires-Dist: numpy; extra == "numpy"
Classifier: Operating System :: POSIX :: Linux
Classifier: Typing :: Typed
Description-Content-Type: text/markdown

%s"""


def version():
    with open(os.path.join(ROOT, "include", "psoup", "common.h"), encoding="utf-8") as f:
        return ".".join(re.findall(r"#define PSOUP_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", f.read()))


def platform_tag(library):
    """manylinux of the glibc that the library needs (PEP 600), where it needs nothing else."""
    text = subprocess.run(["objdump", "-p", library], check=True, stdout=subprocess.PIPE).stdout.decode()
    needed = set(re.findall(r"NEEDED\s+(\S+)", text))
    machine = platform.machine()
    if {n for n in needed if not re.match(r"(libc|libm|libpthread|libdl|librt|ld-linux\S*)\.so\.\d+$", n)}:
        return "linux_" + machine
    major, minor = max(tuple(map(int, v)) for v in re.findall(r"GLIBC_(\d+)\.(\d+)", text))
    return "manylinux_%d_%d_%s" % (major, minor, machine)


def read(*names):
    with open(os.path.join(*names), "rb") as f:
        return f.read()


def write_wheel(directory, tag, package):
    """`package` is [(name in the wheel, bytes)]; the rest is added here. The same files give the same bytes."""
    info = "%s-%s.dist-info" % (NAME, version())
    files = list(package)
    files.append((info + "/METADATA", (METADATA % (version(), read(HERE, "README.md").decode())).encode()))
    files.append((info + "/WHEEL", ("Wheel-Version: 1.0\nGenerator: psoup backend\nRoot-Is-Purelib: false\nTag: %s\n"
                                    % tag).encode()))
    files.append((info + "/licenses/LICENSE", read(ROOT, "LICENSE")))
    for name in LINKED:
        for path in sorted(glob.glob("/usr/share/doc/lib%s-dev/copyright" % name))[:1]:
            files.append((info + "/licenses/%s" % name, read(path)))
    record = info + "/RECORD"
    lines = ["%s,sha256=%s,%d" % (name, base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode(),
                                  len(data)) for name, data in files]
    files.append((record, ("\n".join(lines + [record + ",,"]) + "\n").encode()))
    wheel = "%s-%s-%s.whl" % (NAME, version(), tag)
    os.makedirs(directory, exist_ok=True)
    with zipfile.ZipFile(os.path.join(directory, wheel), "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in files:
            entry = zipfile.ZipInfo(name, (2000, 1, 1, 0, 0, 0))
            entry.external_attr = (0o755 if name.endswith(".so") else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            z.writestr(entry, data)
    return wheel


def wheel_with(library, directory):
    package = [("%s/%s" % (NAME, f), read(HERE, NAME, f)) for f in sorted(os.listdir(os.path.join(HERE, NAME)))
               if f.endswith((".py", ".typed"))]
    package.append(("%s/libpsoup.so" % NAME, read(library)))
    return write_wheel(directory, "py3-none-" + platform_tag(library), package)


# ---- PEP 517 and 660 ------------------------------------------------------------------------------------


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    subprocess.run(["make", "-s", "-C", ROOT, "CC=gcc", "config=release", LIBRARY], check=True)
    return wheel_with(os.path.join(ROOT, LIBRARY), wheel_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    subprocess.run(["make", "-s", "-C", ROOT, "lib/libpsoup.so"], check=True)
    return write_wheel(wheel_directory, "py3-none-any", [(NAME + ".pth", (HERE + "\n").encode())])


def build_sdist(sdist_directory, config_settings=None):
    raise NotImplementedError("the library's source is outside this folder: build from a checkout")


if __name__ == "__main__":
    print("  WHEEL " + os.path.join(sys.argv[2], wheel_with(sys.argv[1], sys.argv[2])))
