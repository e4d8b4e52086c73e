"""Writes the seccomp program of a list of allowed system calls to a file, as systemd would make it.

Run by Debian's Python, which has libseccomp's binding; names that this kernel's architecture lacks are passed over.
"""

import errno
import sys

import seccomp

program = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
for name in sys.stdin.read().split():
    try:
        program.add_rule(seccomp.ALLOW, name)
    except (RuntimeError, OSError):
        continue
with open(sys.argv[1], "wb") as file:
    program.export_bpf(file)
