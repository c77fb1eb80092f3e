"""``moa combiners``: which there are, how they compare, and a page of each."""

import inspect
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moa_lightning.combiners import Combiner
from moa_lightning.combiners.claims import MEANINGS, Claim
from moa_lightning.commands.combiners.facts import FAMILIES, Facts, every_combiner, facts
from moa_lightning.commands.errors import closest
from moa_lightning.errors import UserError
from moa_lightning.signals import MEANINGS as SIGNALS
from moa_lightning.utils.console import table_console
from moa_lightning.utils.import_path import import_dotted

_HEAD = ("combiner", "reads", "remembers", "extra backward passes", "claims", "convergence")
_WIDTHS = (17, 13, 16, 15, 17, 32)  # at most: 120 columns together with the spaces between them
_WHOLE = ("combiner", "claims")  # these columns stay whole in a narrow terminal
_SHOWN = 3  # names of what is remembered; the page has all of them


def combiners(name: str | None = None, output: str | None = None) -> None:
    """Compare the combiners in one table, or print the page of one of them.

    Args:
        name: print this combiner's page: one of the package, or the class path of your own, such as my_combiner.Mine.
        output: folder to write one Markdown page for each combiner to, and the table as ``index.md``.

    Raises:
        UserError: there is no such combiner.
    """
    known = every_combiner()
    chosen = known if name is None else [_named(name, known)]
    if output is not None:
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        for one in chosen:
            (folder / f"{one.name}.md").write_text(page(one), encoding="utf-8")
        if name is None:
            (folder / "index.md").write_text(index(known), encoding="utf-8")
        print(f"written to {output}: {len(chosen)} page{'s' * (len(chosen) > 1)}{', index.md' * (name is None)}")
    elif name is None:
        _print_table(known, table_console())
    else:
        print(page(chosen[0]), end="")


def _named(name: str, known: Sequence[Facts]) -> Facts:
    for one in known:
        if one.name == name:
            return one
    if "." not in name:
        close = closest(name, [one.name for one in known]) or ";"
        raise UserError(
            f"there is no combiner '{name}'{close} 'moa combiners' lists them, "
            "and one of your own has its module before it, such as my_combiner.Mine"
        )
    try:
        found = import_dotted(name)
    except UserError as error:
        raise UserError(str(error).replace("function", "combiner", 1)) from error
    if not (inspect.isclass(found) and issubclass(found, Combiner)) or inspect.isabstract(found):
        raise UserError(f"'{name}' is no combiner: subclass moa_lightning.combiners.Combiner and write combine")
    return facts(found, name)


def _print_table(known: Sequence[Facts], console: Console) -> None:
    """Print the comparison, family by family, and what its words mean."""
    for family, what in FAMILIES.items():
        console.print(Text(f"{family}: {what}", "bold"))
        console.print(_family([one for one in known if one.family == family]))
        console.print()
    _print_legend("reads", {str(s): text for s, text in SIGNALS.items()}, console)
    _print_legend("claims", {_letter(c): f"{c}: {text}" for c, text in MEANINGS.items()}, console)
    console.print("A page of each: moa combiners --name=PAMA")


def _family(known: Sequence[Facts]) -> Table:
    """A row for each combiner."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    for heading, width in zip(_HEAD, _WIDTHS, strict=True):
        table.add_column(heading, max_width=width, overflow="fold", no_wrap=heading in _WHOLE)
    for one in known:
        table.add_row(*_row(one, _letters(one)))
    return table


def _row(one: Facts, claims: str) -> tuple[str, ...]:
    left = len(one.remembered) - _SHOWN
    remembered = ", ".join(one.remembered[:_SHOWN]) + (f" and {left} more" if left > 0 else "")
    convergence = one.sections.get("Convergence", "not stated").removesuffix(".").replace("`", "")
    return (one.name, ", ".join(one.needs), remembered or "nothing", one.extra_passes, claims, convergence)


def _letter(claim: Claim) -> str:
    return {Claim.ONE_OBJECTIVE: "1", Claim.SHIFT: "+", Claim.MIN_NORM: "K"}.get(claim, claim.value[0].upper())


def _letters(one: Facts) -> str:
    claimed = one.combiner.claimed if one.combiner else frozenset()
    return " ".join(_letter(claim) if claim in claimed else "·" for claim in Claim)


def _print_legend(title: str, meanings: dict[str, str], console: Console) -> None:
    table = Table.grid(padding=(0, 0, 0, 2), pad_edge=True)
    for name, text in meanings.items():
        table.add_row(name, text)
    console.print(Text(title, "bold"))
    console.print(table)
    console.print()


def index(known: Sequence[Facts]) -> str:
    """The comparison as Markdown; what a combiner claims stands on its page."""
    lines = ["# Combiners", ""]
    for family, what in FAMILIES.items():
        lines += [f"## {family}", "", f"{what[0].upper()}{what[1:]}.", ""]
        lines += ["| combiner | choose it when | reads, remembers | extra backward passes |", f"|{' --- |' * 4}"]
        for one in (f for f in known if f.family == family):
            name, reads, remembers, passes, *_ = _row(one, "")
            told = one.sections.get("Choose it when", "").removesuffix(".")
            lines.append(f"| [{name}]({name}.md) | {told} | {reads}; {remembers} | {passes} |")
        lines.append("")
    lines += ["## What the claims mean", "", *(f"* **{c}**: {text}." for c, text in MEANINGS.items()), ""]
    return "\n".join(lines)


def page(one: Facts) -> str:
    """A combiner's page, as Markdown: the same headings in the same order for each."""
    told = {label: _sentence(text) for label, text in one.sections.items()}
    symbols = one.sections.get("Symbols", "").removesuffix(".")
    missing, deviations = one.sections.get("Missing score"), one.sections.get("Deviations")
    lines = [f"# {one.name}", "", one.summary, "", *(text for paragraph in one.body for text in (paragraph, ""))]
    lines += _section("Formula", told.get("Formula"))
    lines += _section("Symbols", "\n".join(f"* {symbol}" for symbol in symbols.split("; ") if symbol))
    lines += _section("When", told.get("Choose it when"))
    lines += _section("Cost", told.get("Cost"))
    lines += _section("What it reads and remembers", "\n".join(_memory(one)))
    lines += _section("A response without a score", missing and f"The objective {missing}")
    lines += _section("KL", f"The penalty of `RewardKL` {one.kl_penalty}.")
    lines += _section("Convergence", told.get("Convergence"))
    if claimed := _claims(one):
        lines += ["## What it claims", "", "With its default settings; tested on every input of the contract.", ""]
        lines += [*(f"* **{claim}**: {MEANINGS[Claim(claim)]}" for claim in claimed), ""]
    if one.settings:
        lines += ["## Settings", "", "| setting | default | meaning |", "| --- | --- | --- |"]
        lines += [f"| `{s.name}` | `{s.default}` | {s.meaning} |" for s in one.settings]
        lines.append("")
    lines += ["## YAML", "", "```yaml", one.preset.rstrip(), "```", ""]
    lines += _section("What to watch in the logs", told.get("Watch"))
    lines += _section("Source", told.get("Source"), deviations and f"Deviations: {deviations}")
    code = ", ".join(f"`{module}`" for module in (one.module, *one.mathematics))
    lines += _section("Code and test", f"Code: {code}", one.test and f"Test: `{one.test}`")
    return "\n".join(lines)


def _section(title: str, *paragraphs: str | None) -> list[str]:
    """A heading and what is below it; nothing without text."""
    shown = [text for text in paragraphs if text]
    return [line for text in (f"## {title}", *shown) for line in (text, "")] if shown else []


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _memory(one: Facts) -> list[str]:
    lines = [f"* reads **{need}**: {SIGNALS[need]}" for need in one.needs]
    lines += [f"* remembers: {', '.join(one.remembered) or 'nothing'}"] if one.combiner else []
    return [*lines, f"* extra backward passes: {one.extra_passes}"]


def _claims(one: Facts) -> list[Claim]:
    return [claim for claim in Claim if one.combiner and claim in one.combiner.claimed]
