"""The program's version, as CHANGELOG.md has it."""

VERSION = "0.2.0"
