"""Installed units as systemd reads them: a unit's file, then the drop-ins of its prefix, its template and its own."""

import re
import shlex
import socket
from collections import defaultdict
from pathlib import Path

UNITS = "usr/local/lib/systemd/system"
FOLDERS = {"%S": "/var/lib", "%C": "/var/cache", "%l": socket.gethostname().partition(".")[0]}


class Unit:
    """The settings of one service, specifiers replaced."""

    def __init__(self, root: Path, name: str) -> None:
        """`name`: with its instance, as in chord-actor@0.service."""
        stem, _, instance = name.removesuffix(".service").partition("@")
        self.name = name
        self.settings: dict[str, list[str]] = defaultdict(list)
        template = f"{stem}@.service" if instance else name
        places = {f"{stem.partition('-')[0]}-.service.d", f"{template}.d", f"{name}.d"}
        folders = [root / folder / place for folder in (UNITS, "etc/systemd/system") for place in places]
        drop_ins = sorted((path for folder in folders for path in folder.glob("*.conf")), key=lambda path: path.name)
        for path in (root / UNITS / template, *drop_ins):
            self._read(path.read_text(), FOLDERS | {"%i": instance})

    def _read(self, text: str, specifiers: dict[str, str]) -> None:
        for key, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
            for specifier, meaning in specifiers.items():
                value = value.replace(specifier, meaning)
            self.settings[key].append(value)

    def __getitem__(self, key: str) -> str:
        """The last value given, which is the one that counts where there can be one only."""
        return self.settings[key][-1]

    def environment(self, root: Path) -> dict[str, str]:
        """The unit's own, then what the environment files in `root` say."""
        words = [word for line in self.settings["Environment"] for word in shlex.split(line)]
        for name in self.settings["EnvironmentFile"]:
            path = root / name.lstrip("-/")
            lines = path.read_text().splitlines() if path.exists() else []
            words += [line for line in lines if line and not line.startswith("#")]
        return dict(word.split("=", 1) for word in words)

    @property
    def credentials(self) -> dict[str, str]:
        """Name of each credential, and the file that it is loaded from."""
        return dict(line.split(":", 1) for line in self.settings["LoadCredential"])

    def command(self, environment: dict[str, str]) -> list[str]:
        return [
            re.sub(r"\$\{(\w+)\}", lambda name: environment[name[1]], word) for word in shlex.split(self["ExecStart"])
        ]
