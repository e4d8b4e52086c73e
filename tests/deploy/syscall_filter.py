"""Writes the seccomp program of allowed system calls and address families to a file, as systemd would make it.

Run by Debian's Python, which has libseccomp's binding; names that this kernel's architecture lacks are passed over.
"""

import errno
import socket
import sys

import seccomp

path, *families = sys.argv[1:]
program = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
for name in sys.stdin.read().split():
    try:
        if name == "socket":
            for family in families:
                program.add_rule(seccomp.ALLOW, name, seccomp.Arg(0, seccomp.EQ, getattr(socket, family)))
        else:
            program.add_rule(seccomp.ALLOW, name)
    except (RuntimeError, OSError):
        continue
with open(path, "wb") as file:
    program.export_bpf(file)
