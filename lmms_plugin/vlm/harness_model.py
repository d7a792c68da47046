"""Adapter from lmms-eval's model interface to a responder."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Self

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger

from lmms_plugin.arguments import ModelArguments, read_arguments
from lmms_plugin.ending import ends_the_command, in_command
from lmms_plugin.vlm.contracts.engine import ContinuationScore
from lmms_plugin.vlm.contracts.requests import read
from lmms_plugin.vlm.contracts.responding import Responder


class Likelihood(NamedTuple):
    """Score of a continuation in the form that lmms-eval's tasks take."""

    number: float
    is_greedy: bool

    def strip(self) -> str:
        """Appear empty to the response cache, from which a pair would return as a string that no task can read."""
        return ""


class HarnessModel(lmms):
    """Model that passes lmms-eval's requests to a responder, which a subclass creates.

    lmms-eval creates the model before it looks for tasks and their data. So arguments are checked when the model is
    created, and what takes minutes waits for the first request: a missing dataset costs no calibration.
    """

    is_simple = False
    arguments: ModelArguments

    @cached_property
    def responder(self) -> Responder:
        """Return the responder to requests; the first look makes it ready, and ends the command where it cannot be."""
        with ends_the_command():
            return self.make_responder()

    @abstractmethod
    def make_responder(self) -> Responder:
        """Load what answers requests; called once, at the first request.

        Raises:
            ValueError: It cannot be loaded.
        """

    def make_ready(self) -> Self:
        """Make the responder now and not at the first request, and return the model."""
        _ = self.responder
        return self

    @property
    def is_ready(self) -> bool:
        """Return whether the responder was made."""
        return "responder" in vars(self)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        """Create from `--model_args`, which override what lmms-eval's command adds to them (`batch_size`, `device`)."""
        with ends_the_command():
            given = read_arguments(arg_string)
            added = {name: value for name, value in (additional_config or {}).items() if value is not None}
            if _is_unasked(added.get("batch_size")):
                del added["batch_size"]
            return cls(**{**added, **given})

    @property
    def batch_size(self) -> int:
        """Return the number of images answered together."""
        return self.responder.batch_size

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer every request; see `Responder.generate`."""
        return self.responder.generate(read(requests, self.task_dict)) if requests else []

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answer multi-round tasks; see `Responder.generate_rounds`."""
        return self.responder.generate_rounds(read(requests, self.task_dict)) if requests else []

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Score every request's continuation as lmms-eval's own models do, which contradicts its documentation.

        lmms-eval 0.7 takes the choice with the smallest number for the answer to a multiple-choice question, because
        its models return a loss. So a choice gets its negative log-likelihood (in nats, summed over its tokens), while
        for tasks of type `loglikelihood`, which compute perplexity, the number is the log-likelihood itself.

        Returns:
            For each request, as `text` of the result, the number and whether greedy decoding would write the
            continuation. (lmms-eval turns bare pairs into strings, which its own tasks then cannot read.)
        """
        choices = [isinstance(request.target, str) for request in read(requests, self.task_dict)]
        pairs = zip(choices, self.scores(requests), strict=True)
        return [
            GenerationResult(Likelihood(-score.total if choice else score.total, score.is_greedy))
            for choice, score in pairs
        ]

    def scores(self, requests: Sequence[Any]) -> list[ContinuationScore]:
        """Return the log-probabilities of every request's continuation, token by token."""
        return self.responder.scores(read(requests, self.task_dict)) if requests else []

    def figures(self) -> Mapping[str, Any]:
        """Return the values for the results file besides speed."""
        return {}

    def clean(self) -> None:
        """Free the model.

        lmms-eval calls this when everything is answered. It is also given speed and figures for the results file here,
        because a run whose answers all come from the cache never asks for one.
        """
        if not self.is_ready and self.rank == 0 and (self.arguments.report or self.arguments.save_quantized):
            logger.info("No request came to the model; it is made ready for what is to be written of it")
            self.make_ready()
        if self.is_ready:
            usage = self.responder.usage
            log_metrics(
                total_elapsed_time=usage.seconds,
                total_gen_tokens=usage.tokens,
                avg_speed=usage.speed,
                additional_metrics=self.figures(),
            )
            del self.responder
        elif self.rank == 0:
            logger.info(
                "No request came to the model, so it was not loaded: the results hold no sizes and no speed "
                "(--use_cache gives earlier answers again)"
            )
        super().clean()


def _is_unasked(batch_size: object) -> bool:
    """Return whether a batch size is the one that lmms-eval's command passes where none is given.

    It passes the number 1 then; what is given on the command line is text. From Python, or from a file of evaluations,
    a number may have been given.
    """
    return type(batch_size) is int and batch_size == 1 and in_command(sys.argv)
