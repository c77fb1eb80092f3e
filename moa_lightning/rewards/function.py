"""Rewards that a user writes as a Python function."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from typing_extensions import override

from moa_lightning.errors import UserError
from moa_lightning.rewards.base import Reward
from moa_lightning.utils.import_path import import_dotted

# Arguments that TRL's trainers pass besides the data's columns, and that this package does not have.
_ONLY_TRL_PASSES = frozenset(
    {"prompt_ids", "completion_ids", "completions_ids", "trainer_state", "log_extra", "log_metric", "environments"}
)


@dataclass
class FunctionReward(Reward):
    """A function ``f(prompts, completions, **columns) -> list[float | None]``: the signature of TRL.

    Dataset columns are passed as keyword arguments by name, or all of them if the function takes ``**kwargs``. Each is
    a list with one entry per completion. Return ``None`` or NaN to skip a completion: it is excluded from this
    objective only. The function may be in a module in the current folder.

    Differences from TRL: arguments from the trainer (``completion_ids``, ``trainer_state``, …) are not passed, and
    functions must not be ``async``.

    Args:
        function: dotted path, such as ``rewards.brevity`` for ``def brevity`` in ``rewards.py``; in Python, the
            function itself.
        conversational: pass each prompt and completion as a list with one chat message, as TRL does for conversational
            data, instead of text. The prompt's message holds the full prompt as the policy reads it.
    """

    function: str | Callable[..., Any]
    conversational: bool = False
    _resolved: Callable[..., Any] | None = field(default=None, init=False, repr=False, compare=False)
    _accepted: frozenset[str] | None = field(default=None, init=False, repr=False, compare=False)  # None: everything

    @property
    @override
    def title(self) -> str:
        given = self.function
        return f"function '{given if isinstance(given, str) else getattr(given, '__name__', type(given).__name__)}'"

    def check(self, columns: set[str]) -> None:
        """Import the function and compare its parameters with the columns.

        Raises:
            UserError: it does not import, is not callable, is async, or needs a column that the data lacks.
        """
        parameters = self._resolve()
        for parameter in parameters:
            required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
            if required and parameter.name not in columns | {"prompts", "completions"}:
                hint = ""
                if parameter.name in _ONLY_TRL_PASSES:
                    hint = "; only TRL's trainer passes that: give the parameter a default"
                raise UserError(
                    f"{self.title} needs column '{parameter.name}', which the data does not have; columns: "
                    f"{', '.join(sorted(columns)) or 'none beside the prompt'}{hint}"
                )

    def setup(self, device: torch.device) -> None:
        """Import the function, if :meth:`check` was not called."""
        self._resolve()

    def score(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        """Call the function. The panel checks what it returns."""
        if self._resolved is None:
            self._resolve()
        assert self._resolved is not None
        arguments: dict[str, list[Any]] = {
            "prompts": self._as_messages("user", prompts),
            "completions": self._as_messages("assistant", completions),
            **columns,
        }
        if self._accepted is not None:
            arguments = {name: values for name, values in arguments.items() if name in self._accepted}
        scores: list[float | None] = self._resolved(**arguments)
        return scores

    def _as_messages(self, role: str, texts: list[Any]) -> list[Any]:
        return [[{"role": role, "content": text}] for text in texts] if self.conversational else texts

    def _resolve(self) -> list[inspect.Parameter]:
        """Import the function once; returns its parameters, without ``*args``."""
        if self._resolved is None:
            found = import_dotted(self.function) if isinstance(self.function, str) else self.function
            self._resolved = self._callable(found)
        try:
            signature = inspect.signature(self._resolved)
        except (TypeError, ValueError):
            raise UserError(
                f"{self.title} has no signature that Python can read; wrap it: def f(prompts, completions, **kwargs)"
            ) from None
        parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_POSITIONAL]
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
        if positional:
            raise UserError(
                f"{self.title} takes '{positional[0]}' by position only, but rewards are called by "
                "keyword; remove the '/'"
            )
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            self._accepted = frozenset(p.name for p in parameters)
        return parameters

    def _callable(self, found: Any) -> Callable[..., Any]:
        if inspect.isclass(found) or not callable(found):
            kind = "a class" if inspect.isclass(found) else f"of type {type(found).__name__}"
            raise UserError(
                f"{self.title} is {kind}, not a function; give the path of a function f(prompts, completions, **kwargs)"
            )
        inside = getattr(found, "__call__", found)  # noqa: B004  # an object's __call__ may be async
        if any(test(f) for f in (found, inside) for test in (inspect.iscoroutinefunction, inspect.isasyncgenfunction)):
            raise UserError(f"{self.title} is async, which is not supported; write 'def' instead of 'async def'")
        return found  # type: ignore[no-any-return]  # checked above; narrowing loses it
