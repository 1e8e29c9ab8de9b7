"""Writes psoup/_abi.py and psoup/options.py: the public headers as ctypes sees them.

    python3 generate_abi.py            writes both files
    python3 generate_abi.py --check    fails where a file is not what the headers say

Types, functions and enums are read from clang's syntax tree, the values of the PSOUP_..._INIT macros
from a program that a C compiler builds. Nothing is known here by name but what ctypes cannot express;
a new function, struct or enum of a header needs no change of this file.
"""

import json
import keyword
import os
import re
import struct
import subprocess
import sys
import tempfile
import textwrap

HERE = os.path.dirname(os.path.abspath(__file__))
INCLUDE = os.path.join(HERE, "..", "..", "include")

SCALARS = {
    "int": "c_int", "char": "c_char", "float": "c_float", "double": "c_double", "void": "None",
    "size_t": "c_size_t", "int8_t": "c_int8", "uint8_t": "c_uint8", "int16_t": "c_int16",
    "uint16_t": "c_uint16", "int32_t": "c_int32", "uint32_t": "c_uint32", "int64_t": "c_int64",
    "uint64_t": "c_uint64", "unsigned int": "c_uint32", "unsigned char": "c_uint8",
}


def tree():
    """Every top-level declaration of the public headers, as clang has it."""
    with tempfile.TemporaryDirectory() as work:
        source = os.path.join(work, "all.c")
        with open(source, "w") as f:
            for name in sorted(os.listdir(os.path.join(INCLUDE, "psoup"))):
                f.write('#include "psoup/%s"\n' % name)
        clang = os.environ.get("CLANG", "clang")
        text = subprocess.run(
            [clang, "-Xclang", "-ast-dump=json", "-fsyntax-only", "-std=c11", "-I" + INCLUDE, source],
            check=True, stdout=subprocess.PIPE,
            env=dict(os.environ, CCACHE_DISABLE="1")).stdout  # ccache would answer with an older tree
    return json.loads(text)["inner"]


class Headers:
    def __init__(self):
        self.enums = []      # (C name or None, [(name, value)])
        self.structs = []    # (C name, [(field, type)] or None where it is opaque)
        self.callbacks = []  # (C name, type)
        self.functions = []  # (name, return type, [(parameter, type)])
        self.order = []      # structs and callbacks as they appear
        complete = {}
        for d in tree():
            kind, name = d["kind"], d.get("name", "")
            if kind == "EnumDecl" and self.ours(d):
                self.enums.append((name or None, self.constants(d)))
            elif kind == "RecordDecl" and name.startswith("psoup_"):
                fields = [(f["name"], f["type"]["qualType"]) for f in d.get("inner", ())
                          if f["kind"] == "FieldDecl"]
                if name not in complete:
                    self.order.append(("struct", name))
                if d.get("completeDefinition") or name not in complete:
                    if name in complete:  # seen before as a name only: its place is where its fields are
                        self.order.remove(("struct", name))
                        self.order.append(("struct", name))
                    complete[name] = fields if d.get("completeDefinition") else None
            elif kind == "TypedefDecl" and name.startswith("psoup_"):
                if "(*)" in d["type"]["qualType"]:
                    self.callbacks.append((name, d["type"]["qualType"]))
                    self.order.append(("callback", name))
            elif kind == "FunctionDecl" and name.startswith("psoup_"):
                returns = d["type"]["qualType"].split("(", 1)[0].strip()
                parameters = [(p.get("name", ""), p["type"]["qualType"]) for p in d.get("inner", ())
                              if p["kind"] == "ParmVarDecl"]
                self.functions.append((name, returns, parameters))
        self.structs = [(n, complete[n]) for kind, n in self.order if kind == "struct"]
        self.names = {n for n, _ in self.structs} | {n for n, _ in self.callbacks}
        self.enum_names = {n for n, _ in self.enums if n}

    @staticmethod
    def ours(d):
        constants = [c["name"] for c in d.get("inner", ()) if c["kind"] == "EnumConstantDecl"]
        return bool(constants) and constants[0].startswith("PSOUP_")

    @staticmethod
    def constants(d):
        out, following = [], 0
        for c in d.get("inner", ()):
            if c["kind"] != "EnumConstantDecl":
                continue
            for e in c.get("inner", ()):
                if "value" in e:
                    following = int(e["value"])
            out.append((c["name"], following))
            following += 1
        return out

    # ---- C types as ctypes has them ------------------------------------------------------------

    def ctype(self, text, role):
        """`role` is where it stands: parameter, return or field."""
        text = re.sub(r"\b(enum|struct) ", "", text).strip()
        function = re.match(r"^(.*?)\(\*\)\((.*)\)$", text)
        if function:
            returns, parameters = function.groups()
            parts = [] if parameters == "void" else [p.strip() for p in parameters.split(",")]
            words = [self.ctype(returns, "callback")] + [self.ctype(p, "parameter") for p in parts]
            return "CFUNCTYPE(%s)" % ", ".join(words)
        array = re.match(r"^(.*?)\[(\d+)\]$", text)
        if array:
            return "%s * %s" % (self.ctype(array.group(1), "field"), array.group(2))
        if text.endswith("const"):
            text = text[:-len("const")].strip()
        if text.endswith("*"):
            target = text[:-1].strip()
            bare = re.sub(r"\bconst\b", "", target).strip()
            if bare == "void":
                return "c_void_p"
            if bare == "char":  # text to write into or to free is an address, not Python's bytes
                return "c_char_p" if "const" in target else "c_void_p"
            if bare == "char *" and "const" not in target:
                return "POINTER(c_void_p)"
            return "POINTER(%s)" % self.ctype(target, "field")
        text = re.sub(r"\bconst\b", "", text).strip()
        if text in self.enum_names:
            return "c_int"
        if text in SCALARS:
            return SCALARS[text]
        if text in self.names:
            return text
        raise SystemExit("generate_abi.py: no ctypes type for %r" % text)

    # ---- defaults ----------------------------------------------------------------------------------

    def defaults(self):
        """{struct: {field: value}} of the INIT macros, without what is zero."""
        text = "".join(open(os.path.join(INCLUDE, "psoup", n)).read()
                       for n in sorted(os.listdir(os.path.join(INCLUDE, "psoup"))))
        macros = set(re.findall(r"#define (PSOUP_\w+_INIT)\b", text))
        lines, wanted = [], []
        for name, fields in self.structs:
            macro = name.upper() + "_INIT"
            if macro not in macros or not fields:
                continue
            wanted.append(name)
            macros.discard(macro)
            lines.append("    { %s x = %s;" % (name, macro))
            for field, ctype in fields:
                if field == "size":
                    continue
                array = re.match(r"^(.*?)\[(\d+)\]$", ctype)
                for i in range(int(array.group(2)) if array else 1):
                    bare = array.group(1) if array else ctype
                    bare = re.sub(r"^enum ", "", bare)
                    item = "x.%s%s" % (field, "[%d]" % i if array else "")
                    if bare in ("float", "double"):
                        lines.append('      printf("%s %s %s %%.17g\\n", (double)%s);'
                                     % (name, field, bare, item))
                    elif bare in self.enum_names or re.match(r"^(u?int\d+_t|int|size_t)$", bare):
                        lines.append('      printf("%s %s int%s %%lld\\n", (long long)%s);'
                                     % (name, field, "s" if array else "", item))
            lines.append("    }")
        if macros:
            raise SystemExit("generate_abi.py: macros of no struct: %s" % ", ".join(sorted(macros)))
        out = {name: {} for name in wanted}
        for line in compiled("int main(void) {\n%s\n    return 0;\n}\n" % "\n".join(lines)):
            name, field, kind, value = line.split()
            if kind == "ints":
                out[name].setdefault(field, []).append(int(value))
            elif float(value) != 0:
                out[name][field] = (int(value) if kind == "int" else
                                    shortest(float(value)) if kind == "float" else float(value))
        return out


def compiled(body):
    """The output lines of a C program that includes every header."""
    with tempfile.TemporaryDirectory() as work:
        source, program = os.path.join(work, "p.c"), os.path.join(work, "p")
        with open(source, "w") as f:
            f.write("#include <stdio.h>\n")
            for name in sorted(os.listdir(os.path.join(INCLUDE, "psoup"))):
                f.write('#include "psoup/%s"\n' % name)
            f.write(body)
        subprocess.run([os.environ.get("CC", "gcc"), "-std=c11", "-I" + INCLUDE, source, "-o", program],
                       check=True)
        return subprocess.run([program], check=True, stdout=subprocess.PIPE).stdout.decode().splitlines()


def shortest(x):
    """The shortest decimal that is the same f32."""
    for digits in range(1, 10):
        text = "%.*g" % (digits, x)
        if struct.pack("f", float(text)) == struct.pack("f", x):
            return float(text)
    return x


def camel(name):
    return "".join(w.capitalize() for w in name[len("psoup_"):].split("_"))


def python_name(field):
    return field + "_" if keyword.iskeyword(field) else field


def short(constants):
    """Enum names without the words that all of them begin with."""
    words = os.path.commonprefix([n for n, _ in constants])
    cut = words.rfind("_") + 1
    return [(n[cut:], v) for n, v in constants]


HEADING = '''"""%s

Written by generate_abi.py from include/psoup/*.h; do not edit.
"""
'''


def abi(h):
    out = ['''
# ---- enums -------------------------------------------------------------------------------------
''']
    table = []
    for name, constants in h.enums:
        if name:
            out.append("\nclass %s(IntEnum):" % camel(name))
            out += ["    %s = %d" % c for c in short(constants)]
            out.append("")
            table.append('    "%s": %s,' % (name, camel(name)))
        else:
            out.append("")
            out += ["%s = %d" % c for c in constants]
            out.append("")
    out.append("\nENUMS = {  # by their C names\n%s\n}\n" % "\n".join(table))
    out.append("# ---- structs and callbacks: the names are C's -------------------------------------------------\n")
    for name, _ in h.structs:
        out.append("\nclass %s(Structure):\n    pass\n" % name)
    fields = dict(h.structs)
    callbacks = dict(h.callbacks)
    out.append("")
    for kind, name in h.order:
        if kind == "callback":
            out.append("%s = %s" % (name, h.ctype(callbacks[name], "field")))
        elif fields[name] is not None:
            out.append("%s._fields_ = [" % name)
            out += ['    ("%s", %s),' % (f, h.ctype(t, "field")) for f, t in fields[name]]
            out.append("]")
    out.append("\nSTRUCTS = (")
    out += ["    %s," % n for n, f in h.structs if f is not None]
    out.append(")\nOPAQUE = (")
    out += ["    %s," % n for n, f in h.structs if f is None]
    out.append(")\n")
    out.append("# What the INIT macros set; other fields are zero, and size is the struct's.\n"
               "DEFAULTS: Dict[Any, Dict[str, Any]] = {")
    for name, values in h.defaults().items():
        out.append("    %s: {" % name)
        out += ['        "%s": %s,' % (f, tuple(v) if isinstance(v, list) else repr(v))
                for f, v in values.items()]
        out.append("    },")
    out.append("}\n")
    out.append("# Fields that hold an enum.\nENUM_FIELDS: Dict[Any, Dict[str, Any]] = {")
    notes = comments()
    for name, members in h.structs:
        named = [(f, enum_of(h, notes, name, f, t)) for f, t in members or ()]
        if any(e for _, e in named):
            out.append("    %s: {%s}," % (name, ", ".join('"%s": %s' % (f, camel(e)) for f, e in named if e)))
    out.append("}\n")
    out.append("# ---- functions: name: (result, [parameters]) ----------------------------------------------------\n")
    out.append("FUNCTIONS: Dict[str, Tuple[Any, List[Any]]] = {")
    for name, returns, parameters in h.functions:
        words = [h.ctype(t, "parameter") for _, t in parameters]
        out.append('    "%s": (%s, [%s]),' % (name, h.ctype(returns, "return"), ", ".join(words)))
    out.append("}\n")
    body = "\n".join(out)
    words = sorted(set(re.findall(r"\b(c_\w+|CFUNCTYPE|POINTER|Structure)\b", body)), key=str.lower)
    names = "\n".join(textwrap.wrap(", ".join(words), 80, initial_indent="    ", subsequent_indent="    "))
    return ("%s\nfrom ctypes import (\n%s,\n)\nfrom enum import IntEnum\n"
            "from typing import Any, Dict, List, Tuple\n%s") % (
        HEADING % "The binary interface of libpsoup: its enums, structs, callbacks and functions.",
        names, body)


# ---- options as types ------------------------------------------------------------------------------

def comments():
    """{struct: {field: comment}} from the headers' own text."""
    out = {}
    for header in sorted(os.listdir(os.path.join(INCLUDE, "psoup"))):
        text = open(os.path.join(INCLUDE, "psoup", header)).read()
        for body, name in re.findall(r"typedef struct psoup_\w+ \{\n(.*?)\n\} (psoup_\w+);", text, re.S):
            found = out.setdefault(name, {})
            for declaration, comment in re.findall(r"([^;]+);\s*(?:/\*(.*?)\*/)?", body, re.S):
                comment = re.sub(r"\s*\n\s*\*\s*", " ", comment).strip()
                declaration = re.sub(r"/\*.*?\*/", "", declaration, flags=re.S).strip()
                for part in declaration.split(","):
                    field = re.sub(r"\[.*", "", part).replace("*", " ").split()
                    if field:
                        found[field[-1]] = comment
    return out


def enum_of(h, notes, struct_name, field, ctype):
    """The enum of a field: its type; where that is int32_t, what its comment or its own name says."""
    bare = re.sub(r"^enum ", "", ctype)
    if bare in h.enum_names:
        return bare
    if bare == "int32_t":
        for word in re.findall(r"psoup_\w+", notes.get(struct_name, {}).get(field, "")):
            if word in h.enum_names:
                return word
        if "psoup_" + field in h.enum_names:
            return "psoup_" + field
    return None


def options(h):
    out = [HEADING % "The options of each call as types, for editors and type checkers." + '''
from __future__ import annotations

from typing import Sequence, TypedDict, Union

''']
    notes, defaults = comments(), h.defaults()
    for name, fields in h.structs:
        if name not in defaults or any("(*)" in t for _, t in fields):
            continue  # a struct of callbacks is no set of options
        lines = []
        for field, ctype in fields:
            if field in ("size", "user", "log_user", "progress_user", "n_stop_tokens") \
                    or field.startswith("reserved"):
                continue
            bare = re.sub(r"^(const |enum )", "", ctype)
            if ctype == "const char *" or ctype.startswith("char["):
                kind = "str"
            elif "[" in ctype:
                kind = "Sequence[int]"
            elif bare in ("float", "double"):
                kind = "float"
            elif re.match(r"^(u?int\d+_t|int|size_t)$", bare) or bare in h.enum_names:
                kind = ("Union[int, str]" if enum_of(h, notes, name, field, ctype) else
                        "Union[int, str, Sequence[str]]" if field == "targets" else "int")
            else:
                continue  # pointers and callbacks: the call's own parameters
            lines.append((field, kind, notes.get(name, {}).get(field, ""),
                          defaults[name].get(field, None if kind == "str" else 0)))
        if not lines:
            continue
        out.append("\nclass %s(TypedDict, total=False):" % camel(name))
        for field, kind, note, default in lines:
            words = "default %s" % (tuple(default) if isinstance(default, list) else default,)
            note = "%s; %s" % (note.rstrip(".;"), words) if note else words
            out += textwrap.wrap(note, 100, initial_indent="    # ", subsequent_indent="    # ",
                                 break_on_hyphens=False)
            out.append("    %s: %s" % (python_name(field), kind))
        out.append("")
    return "\n".join(out)


def main():
    h = Headers()
    files = {"_abi.py": abi(h), "options.py": options(h)}
    stale = []
    for name, text in files.items():
        path = os.path.join(HERE, "psoup", name)
        text = text.rstrip("\n") + "\n"
        old = open(path, encoding="utf-8").read() if os.path.exists(path) else ""
        if old != text:
            stale.append(name)
            if "--check" not in sys.argv[1:]:
                with open(path, "w", encoding="utf-8") as f:
                    f.write(text)
    if "--check" in sys.argv[1:] and stale:
        raise SystemExit("psoup/%s is not what the headers say: run bindings/python/generate_abi.py"
                         % ", psoup/".join(stale))


if __name__ == "__main__":
    main()
