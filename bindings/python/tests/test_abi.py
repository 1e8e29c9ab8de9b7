"""The ctypes declarations against the headers: layouts and values by a C compiler, signatures and
completeness by reading the headers' text, and the whole file against clang's syntax tree."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import unittest

from .case import ROOT, Case, psoup
from psoup import _abi, _library

INCLUDE = os.path.join(ROOT, "include")
PACKAGE = os.path.dirname(os.path.abspath(psoup.__file__))
HEADERS = sorted(os.listdir(os.path.join(INCLUDE, "psoup")))

# Public functions that the Python modules have no use for.
UNUSED = {
    # Python values become JSON through text, in one call each way.
    "psoup_json_kind", "psoup_json_get", "psoup_json_at", "psoup_json_size", "psoup_json_next",
    "psoup_json_integer", "psoup_json_real", "psoup_json_string", "psoup_json_bool",
    "psoup_json_new_object", "psoup_json_new_array", "psoup_json_new_string", "psoup_json_new_integer",
    "psoup_json_new_real", "psoup_json_new_bool", "psoup_json_new_null", "psoup_json_copy",
    "psoup_json_set", "psoup_json_append",
    # Keyword arguments are read and checked by name in Python.
    "psoup_fields_read", "psoup_fields_check",
    # dtype_of knows numpy's and torch's names too.
    "psoup_dtype_name", "psoup_dtype_parse",
    # A device's table is functions of C; arrays are copied by their own libraries.
    "psoup_merge_set_device", "psoup_merge_copy",
    # MergeMethod has the names.
    "psoup_merge_method_name", "psoup_merge_method_parse",
    # MixMethod has the names; the _mixed forms serve both.
    "psoup_mix_method_name", "psoup_mix_method_parse", "psoup_model_logprobs", "psoup_model_logits",
    "psoup_model_gradients",
    # What a run will take is for those who launch it, before it begins: psoup run says it.
    "psoup_generate_memory", "psoup_sft_memory", "psoup_reward_memory", "psoup_dpo_memory", "psoup_ppo_memory",
    "psoup_model_load",          # psoup_model_load_with, without options
    "psoup_model_find_adapter",  # name in model.adapters
    "psoup_model_context",       # model.context
    "psoup_model_load",          # psoup_model_load_with serves both
}


def header_text():
    text = ""
    for name in HEADERS:
        with open(os.path.join(INCLUDE, "psoup", name), encoding="utf-8") as f:
            text += f.read()
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    return re.sub(r"\\\n", " ", text)


def declared():
    """{function: (result, [parameter types])}, types without const and spaces."""
    out = {}
    text = re.sub(r"^\s*#.*$", "", header_text(), flags=re.M)
    # A function's declaration is a statement at the start of a line that is no typedef.
    for result, name, parameters in re.findall(
            r"^(?!typedef)([a-z_][\w \*]*?)\b(psoup_\w+)\s*\(([^;{}]*)\);", text, re.M):
        parts = [] if parameters.strip() in ("void", "") else parameters.split(",")
        out[name] = (plain(result), [plain(re.sub(r"\b\w+\s*$", "", p.strip()) if not p.strip().endswith("*")
                                           else p) for p in parts])
    return out


def plain(c_type):
    """Without const, spaces and the names that are one type on every machine this package is for."""
    c_type = re.sub(r"\s+", "", re.sub(r"\b(const|enum|struct)\b", "", c_type))
    return re.sub(r"\bsize_t\b", "uint64_t", re.sub(r"\bint32_t\b", "int", c_type))


def spelled(kind):
    """A ctypes type as C spells it, without const."""
    if kind is None:
        return "void"
    if kind in CALLBACKS:
        return CALLBACKS[kind]
    if issubclass(kind, ctypes._Pointer):
        return spelled(kind._type_) + "*"
    if issubclass(kind, ctypes.Structure):
        return kind.__name__
    return {ctypes.c_char_p: "char*", ctypes.c_void_p: "void*"}.get(kind) or {
        ctypes.c_int: "int", ctypes.c_uint32: "uint32_t", ctypes.c_int64: "int64_t", ctypes.c_uint64: "uint64_t",
        ctypes.c_float: "float", ctypes.c_double: "double"}.get(kind, kind.__name__)


CALLBACKS = {value: name for name, value in vars(_abi).items()
             if name.endswith("_fn") and isinstance(value, type)}


def same(c_type, kind):
    """Whether a C type may be declared to ctypes as `kind`."""
    if c_type == "void":
        return kind is None
    if c_type in _abi.ENUMS or c_type == "int":
        return kind is ctypes.c_int
    exact = {"uint32_t": ctypes.c_uint32, "int64_t": ctypes.c_int64, "uint64_t": ctypes.c_uint64,
             "float": ctypes.c_float, "double": ctypes.c_double}
    if c_type in exact:
        return kind is exact[c_type]
    if c_type.endswith("*") and c_type[:-1] in _abi.ENUMS:
        return kind == ctypes.POINTER(ctypes.c_int)
    if kind is ctypes.c_void_p:
        return c_type in ("void*", "char*")
    if kind is not None and issubclass(kind, ctypes._Pointer) and kind._type_ is ctypes.c_void_p:
        return c_type in ("void**", "char**")
    return c_type == spelled(kind)


class Abi(Case):
    def compiled(self, body):
        compiler = shutil.which(os.environ.get("CC", "").split(" ")[0] or "gcc") or shutil.which("cc")
        if compiler is None:
            self.skipTest("there is no C compiler")
        source, program = self.path("p.c"), self.path("p")
        with open(source, "w") as f:
            f.write("#include <stdio.h>\n#include <stddef.h>\n")
            f.writelines('#include "psoup/%s"\n' % h for h in HEADERS)
            f.write("int main(void) {\n%s\nreturn 0; }\n" % body)
        subprocess.run([compiler, "-std=c11", "-I" + INCLUDE, source, "-o", program], check=True)
        return subprocess.run([program], check=True, stdout=subprocess.PIPE).stdout.decode().splitlines()

    def test_every_struct_has_the_layout_that_c_gives_it(self):
        lines, ours = [], []
        for s in _abi.STRUCTS:
            lines.append('printf("%s %%zu\\n", sizeof(%s));' % (s.__name__, s.__name__))
            ours.append("%s %d" % (s.__name__, ctypes.sizeof(s)))
            for field, _ in s._fields_:
                lines.append('printf("%s.%s %%zu %%zu\\n", offsetof(%s, %s), sizeof(((%s *)0)->%s));'
                             % (s.__name__, field, s.__name__, field, s.__name__, field))
                d = getattr(s, field)
                ours.append("%s.%s %d %d" % (s.__name__, field, d.offset, d.size))
        self.assertGreater(len(_abi.STRUCTS), 20)
        self.assertEqual(self.compiled("\n".join(lines)), ours)

    def test_every_struct_and_field_of_the_headers_is_there(self):
        ours = {s.__name__: [f for f, _ in s._fields_] for s in _abi.STRUCTS}
        found = {}
        for body, name in re.findall(r"typedef struct psoup_\w+ \{(.*?)\} (psoup_\w+);", header_text(), re.S):
            found[name] = []
            for declaration in body.split(";"):
                pointer = re.search(r"\(\*(\w+)\)\(", declaration)
                for part in [pointer.group(1)] if pointer else declaration.split(","):
                    words = re.findall(r"\w+", re.sub(r"\[.*?\]", "", part))
                    found[name] += words[-1:]
        self.assertEqual(found, ours)

    def test_every_constant_has_its_value(self):
        text = header_text()
        constants = [c for body in re.findall(r"enum\s*\w*\s*\{(.*?)\}", text, re.S)
                     for c in re.findall(r"\b(PSOUP_\w+)\s*(?:=|,|$|\s)", body)]
        ours = {k: v for k, v in vars(_abi).items() if k.startswith("PSOUP_")}
        # An enum's members are shortened by the words they have in common.
        short = {}
        for c_name, enum in _abi.ENUMS.items():
            body = re.search(r"enum %s \{(.*?)\}" % c_name, text, re.S).group(1)
            full = re.findall(r"(PSOUP_\w+)\s*(?:=|,|\Z|\s)", body)
            self.assertEqual(len(full), len(enum), c_name)
            for name, member in zip(full, enum.__members__):
                self.assertTrue(name.endswith(member), "%s and %s" % (name, member))
                short[name] = int(enum[member])
        ours.update(short)
        self.assertEqual(sorted(set(constants)), sorted(ours))
        lines = ['printf("%%lld\\n", (long long)%s);' % c for c in sorted(ours)]
        self.assertEqual([int(x) for x in self.compiled("\n".join(lines))], [ours[c] for c in sorted(ours)])

    def test_defaults_are_what_the_macros_set(self):
        macros = set(re.findall(r"#\s*define\s+(PSOUP_\w+)_INIT\b", header_text()))
        self.assertEqual(macros, {s.__name__.upper() for s in _abi.DEFAULTS})
        lines, ours = [], []
        for s in _abi.DEFAULTS:
            lines.append("{ static %s x; x = (%s)%s_INIT; unsigned char bytes[sizeof x];"
                         % (s.__name__, s.__name__, s.__name__.upper()))
            # Field by field: the bytes between them have no value.
            for field, _ in s._fields_:
                lines.append('for (size_t i = 0; i < sizeof x.%s; i++) printf("%%02x", '
                             '((const unsigned char *)&x.%s)[i]); printf(" %s.%s\\n");'
                             % (field, field, s.__name__, field))
            lines.append("(void)bytes; }")
            value = _library.new(s)
            raw = bytes(value)
            for field, _ in s._fields_:
                d = getattr(s, field)
                ours.append("%s %s.%s" % (raw[d.offset:d.offset + d.size].hex(), s.__name__, field))
        self.assertEqual(self.compiled("\n".join(lines)), ours)

    def test_every_function_has_its_signature(self):
        found = declared()
        self.assertGreater(len(found), 100)
        self.assertEqual(sorted(found), sorted(_abi.FUNCTIONS))
        for name, (result, parameters) in found.items():
            kind, kinds = _abi.FUNCTIONS[name]
            self.assertTrue(same(result, kind), "%s returns %s: declared as %r" % (name, result, kind))
            self.assertEqual(len(parameters), len(kinds), name)
            for i, (c_type, k) in enumerate(zip(parameters, kinds)):
                self.assertTrue(same(c_type, k), "%s, parameter %d is %s: declared as %r" % (name, i, c_type, k))

    def test_the_library_exports_these_functions_and_no_others(self):
        if shutil.which("nm") is None:
            self.skipTest("there is no nm")
        path = _library.lib._name
        if not os.path.exists(path):
            self.skipTest("the library is the system's")
        text = subprocess.run(["nm", "-D", "--defined-only", path], check=True,
                              stdout=subprocess.PIPE).stdout.decode()
        exported = {line.split()[-1].split("@")[0] for line in text.splitlines() if " T " in line}
        self.assertEqual(exported, set(_abi.FUNCTIONS))

    def test_every_function_is_used_or_known_not_to_be(self):
        text = ""
        for name in os.listdir(PACKAGE):
            if name.endswith(".py") and name != "_abi.py":
                with open(os.path.join(PACKAGE, name), encoding="utf-8") as f:
                    text += f.read()
        used = set(re.findall(r"\blib\.(psoup_\w+)", text))
        self.assertEqual(set(_abi.FUNCTIONS) - used, UNUSED)

    def test_the_file_is_what_the_headers_say(self):
        if shutil.which("clang") is None:
            self.skipTest("there is no clang")
        script = os.path.join(ROOT, "bindings", "python", "generate_abi.py")
        done = subprocess.run([sys.executable, script, "--check"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual((done.returncode, done.stderr.decode()), (0, ""))


if __name__ == "__main__":
    unittest.main()
