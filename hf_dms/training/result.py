"""What a search gives its user: the outcome in numbers, the cut model, and its repository on the Hub."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel
from transformers.modelcard import TrainingSummary

from ..archs.plain_view import base_model_of
from ..archs.restoring import restoring
from ..checkpoint.hub import check_not_base, push
from ..checkpoint.save import save_pruned
from ..cut.prune import prune
from ..gating.outcome import SearchOutcome, search_outcome
from ..refit.batch_norms import BATCHES, estimate_batch_norms_
from ..tasks.evaluate import evenly_spaced
from .distributed import unsharded
from .step_guard import OverTrainer


class SearchResultMixin(OverTrainer):
    """What comes after the training, for the Trainer of a search (trainer.py)."""

    def search_outcome(self) -> SearchOutcome:
        """How the search ended: the shares that were learned and that the cut keeps (gating/outcome.py)."""
        return search_outcome(self._unwrapped())

    def soft_and_cut_loss(self) -> tuple[float, float]:
        """Losses on the evaluation data: with the current soft masks, and of the cut before any repair.

        At the end of a search they are close. The difference is the cost of rounding. Every process must call it.
        """
        # In evaluation mode, dropout and batch norms as in the second measurement: only the masks differ.
        with self.gates.soft_masks():
            soft = self._evaluation_loss()
        return soft, self._evaluation_loss()

    def _evaluation_loss(self) -> float:
        """Mean loss on the evaluation data (the first set, if there are several). It is not logged."""
        data = self.eval_dataset
        loader = self.get_eval_dataloader(next(iter(data.values())) if isinstance(data, dict) else data)
        metrics = self.evaluation_loop(loader, "Evaluation", prediction_loss_only=True).metrics
        self.callback_handler.on_predict(self.args, self.state, self.control, metrics)  # closes its progress bar
        return float(metrics["eval_loss"])

    def prune(self) -> PreTrainedModel:
        """Cut the model to the exact budget, and check the result on an example of the trainer's data.

        Batch norms then get new running statistics, measured with the smaller model on some of the training data.

        Returns:
            A plain, smaller `PreTrainedModel`, in evaluation mode. The trainer's model is not modified.

        Raises:
            ValueError: the target cannot be reached.
            VerificationError: the outputs of the cut model differ from those of the masked model.
        """
        with _without_autocast(self._unwrapped(), self.accelerator) as model:
            pruned = prune(unsharded(model), inputs=self.example_inputs())
        # After the proof, which compares both models with the statistics of the search.
        estimate_batch_norms_(pruned, self._some_batches(BATCHES))
        if self._use_cache is not None:
            pruned.config.use_cache = self._use_cache
        return pruned

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> str | Future[str] | None:
        """Prune, save the result as `pruned` in `args.output_dir`, and push it to `args.hub_model_id`.

        Args:
            commit_message: message of the commit.
            blocking: whether to wait until everything is sent.
            token: token of the Hub. Default: `args.hub_token`.
            revision: branch to push to. Default: `args.hub_revision`.
            private: whether a new repository is private. Default: `args.hub_private_repo`.
            card: arguments of `Trainer.create_model_card`: model_name, finetuned_from, tasks, tags, language, ...

        Returns:
            The URL of the model, or its future if not blocking; None in processes that do not push.

        Raises:
            ValueError: see `prune` and `hf_dms.push`; or the repository is that of the dense model.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        repo_id = self.args.hub_model_id or Path(self.args.output_dir).name
        check_not_base(repo_id, revision or self.args.hub_revision, base_model_of(self.model).name_or_path)
        # In every process, since a sharded model is gathered by all of them.
        pruned, inputs = self.prune(), self.example_inputs()
        if not self.is_world_process_zero():
            return None
        folder, name = Path(self.args.output_dir, "pruned"), repo_id.rpartition("/")[2]
        files = {"README.md": _model_card(self, **{"model_name": name} | card)}
        save_pruned(pruned, folder, processor=self.processing_class, inputs=inputs, files=files, overwrite=True)
        options: dict[str, Any] = {
            "private": self.args.hub_private_repo if private is None else private,
            "revision": revision or self.args.hub_revision,
            "token": token or self.args.hub_token,
        }
        if blocking:
            return push(folder, repo_id, commit_message=commit_message, **options)
        return HfApi().run_as_future(push, folder, repo_id, commit_message=commit_message, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push nothing: only the pruned model is pushed, never a training checkpoint."""

    def _some_batches(self, count: int) -> Iterator[dict[str, Tensor]]:
        """At most `count` batches of the training data: evenly spaced, or the first ones of a stream."""
        # Not `get_train_dataloader`, which shuffles and gives each process different rows. All must measure the same.
        size, rows = self.args.train_batch_size, self.train_dataset
        if not isinstance(rows, IterableDataset):
            some = evenly_spaced(rows, count * size)
            rows = (some[place] for place in range(len(some)))
        collate, rows = self._get_collator_with_removed_columns(self.data_collator), iter(rows)
        for _ in range(count):
            if examples := list(itertools.islice(rows, size)):
                batch = collate(examples)
                yield {name: value for name, value in batch.items() if isinstance(value, Tensor)}

    def example_inputs(self) -> dict[str, Tensor] | None:
        """One example of the evaluation data, else the training data, as tensors for a forward pass."""
        dataset = self.eval_dataset if self.eval_dataset is not None else self.train_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()), None)
        if dataset is None:
            return None
        example = next(iter(dataset), None) if isinstance(dataset, IterableDataset) else dataset[0]
        if example is None:
            return None
        # As in Trainer's own loaders: rows may have columns that the model does not take.
        batch = self._get_collator_with_removed_columns(self.data_collator)([example])
        return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


def _model_card(trainer: Any, tags: str | list[str] | None = None, **options: Any) -> str:
    """The draft of a model card that Trainer writes."""
    given = [tags] if isinstance(tags, str) else tags or []
    known = ["dms", "pruned", *(getattr(trainer.model, "model_tags", None) or [])]
    summary = TrainingSummary.from_trainer(trainer, tags=list(dict.fromkeys([*given, *known])), **options)
    return summary.to_model_card()


@contextlib.contextmanager
def _without_autocast(model: PreTrainedModel, accelerator: Any) -> Iterator[PreTrainedModel]:
    """Context: the model without autocast. For mixed precision, accelerate wraps its `forward` in autocast."""
    with restoring([model], "forward", "_original_forward"):
        yield accelerator.unwrap_model(model, keep_fp32_wrapper=False)
