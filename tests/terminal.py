"""Runs a command on a terminal of its own and keeps what that shows.

    python3 tests/terminal.py COLUMNS ROWS SCREENS COMMAND...

SCREENS receives every screen that was drawn, a form feed after each, and last the one that is left. The exit status
is the command's, or 99 where the command wrote past the terminal's edge or used what is not known here.
"""

import fcntl
import os
import pty
import re
import struct
import sys
import termios

COLUMNS, ROWS = int(sys.argv[1]), int(sys.argv[2])


class Screen:
    """The few things of a terminal that a progress display needs."""

    def __init__(self):
        self.lines, self.row, self.column, self.trouble = [""], 0, 0, ""

    def write(self, text):
        for part in re.findall(r"\x1b\[[0-9]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+|.", text, re.S):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self.row += 1
                if self.row == len(self.lines):
                    self.lines.append("")
            elif part.startswith("\x1b"):
                self.command(part)
            else:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[:self.column] + part + line[self.column + len(part):]
                self.column += len(part)
                # What is said before anything is drawn, and after, may go on in the next line.
                if self.column >= COLUMNS and not self.lines[self.row].startswith(("memory of ", "psoup: ")):
                    self.trouble = "a line of %d columns: %r" % (self.column, self.lines[self.row])

    def command(self, part):
        many = int(part[2:-1] or 1) if part.startswith("\x1b[") else 1
        if part.startswith("\x1b[") and part[-1] == "A":
            if many >= ROWS:
                self.trouble = "up %d lines of %d" % (many, ROWS)
            self.row = max(self.row - many, 0)
        elif part in ("\x1b[J", "\x1b[K"):
            self.lines[self.row] = self.lines[self.row][:self.column]
            if part == "\x1b[J":
                del self.lines[self.row + 1:]
        else:
            self.trouble = "unknown: %r" % part

    def __str__(self):
        return "\n".join(self.lines)


def main():
    child, terminal = pty.fork()
    if child == 0:
        os.execvp(sys.argv[4], sys.argv[4:])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    screen, text = Screen(), b""
    with open(sys.argv[3], "w", encoding="utf-8") as out:
        while True:
            try:
                more = os.read(terminal, 65536)
            except OSError:  # the other end was closed
                more = b""
            if not more:
                break
            text += more
            # What is drawn ends where the program flushes; a frame begins by going to a line's beginning.
            for frame in re.split(r"(?=\r\x1b\[J)", text.decode("utf-8", "replace")):
                screen.write(frame.replace("\r\n", "\n\r"))
                out.write("%s\n\f\n" % screen)
            text = b""
        out.write("%s\n" % screen)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if screen.trouble:
        print(screen.trouble, file=sys.stderr)
        status = 99
    sys.exit(status)


main()
