"""`LongSpecTrainer`: trains the draft alone, next to a frozen target."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy, has_length

from ..model_card import make_model_card, save_model_card
from ..modeling_longspec import LongSpecDraftModel
from ..target import BoundTarget, bind
from .arguments import LongSpecTrainingArguments
from .collator import IGNORED, AnchorOffsetCollator
from .evaluation import DraftEvaluation, draft_of
from .facts import training_facts
from .losses import FrozenHead, LossSums, chunked_loss
from .positions import max_positions
from .processes import check_sharding, check_target
from .resume import BeginRun, ContinueOffsets, read_record, write_record
from .schedule import TimeBudget, budget_schedule
from .target_states import read_target
from .tau import TauEvaluator
from .vocabulary import rows_of_tokens


class LongSpecTrainer(DraftEvaluation):
    """A `Trainer` whose model is the draft; saving, resuming and sharding see nothing else.

    Per batch: one forward of the target without gradients, keeping one layer's K/V and the final hidden state; one
    forward of the draft with its cross-attention shifted by a drawn number of tokens; cross-entropy and KL in chunks.
    The loss is the sum over positions whose next token is labelled, divided by their number. In several processes
    (DDP, FSDP2, DeepSpeed; `examples/accelerate/`) each has the whole target; rows, offsets and shifts are those of
    one process with the whole batch, and losses are means over all of them. One process uses one GPU.

    Args:
        model: the draft. Half-precision weights become fp32 master weights; use `bf16=True` for speed.
        target_model: the target it is trained for; may be quantised, sharded or offloaded. Its parameters are frozen.
        args: training arguments.
        data_collator: by default an [`AnchorOffsetCollator`] up to the target's context length.
        tau_evaluator: measures tau on held-out texts at every evaluation, with or without an `eval_dataset`.
        **kwargs: as for `Trainer`.

    Raises:
        ValueError: the draft does not fit the target (the message names both values), there are no rows or no token
            to pad them with, or the processes are set up so that a part of the target or of the written draft would
            be missing.
    """

    model: LongSpecDraftModel
    args: LongSpecTrainingArguments
    lr_scheduler: Any
    data_collator: Any

    def __init__(
        self,
        model: LongSpecDraftModel,
        target_model: PreTrainedModel,
        args: LongSpecTrainingArguments | None = None,
        data_collator: Any = None,
        tau_evaluator: TauEvaluator | None = None,
        **kwargs: Any,
    ) -> None:
        args = LongSpecTrainingArguments(output_dir="tmp_trainer") if args is None else args
        draft = draft_of(model)
        # The optimiser's small updates would be lost in half-precision weights.
        model = model.float() if draft.dtype in (torch.bfloat16, torch.float16) else model
        check_target(target_model, args.world_size)
        self.target_model = target_model.requires_grad_(False).eval()
        if getattr(target_model, "hf_device_map", None) is None:
            self.target_model = self.target_model.to(args.device)
        text_config = target_model.config.get_text_config(decoder=True)
        bind(draft.to(args.device), self.target_model, mixed_precision=True)  # refuses a draft that does not fit, now
        if data_collator is None:
            pad = text_config.pad_token_id or 0
            data_collator = AnchorOffsetCollator(pad, max_positions(text_config), seed=args.seed)
        _check_rows(kwargs.get("train_dataset"), data_collator, text_config.vocab_size)
        self.tau_evaluator = tau_evaluator
        args.remove_unused_columns = False  # the collator decides
        args.label_names = ["labels"]
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every step uses all
        args._n_gpu = min(args.n_gpu, 1)  # with more, `Trainer` copies the draft to all GPUs, with the target on one
        strategy = args.eval_strategy
        if kwargs.get("eval_dataset") is None and self._measures_tau(args):
            args.eval_strategy = IntervalStrategy.NO  # `Trainer` knows no evaluation without a dataset
        try:
            super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        finally:
            args.eval_strategy = strategy
        check_sharding(model, args.muon, self.accelerator)
        # `compute_loss` divides by the number of labelled positions of the whole step, accumulation included.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self._micro_batch = (-1, 0)
        self._sums: dict[str, torch.Tensor] = {}
        self._began, self._earlier = time.monotonic(), 0.0
        self._borrowed: tuple[BoundTarget, FrozenHead, torch.Tensor | None] | None = None
        if args.muon:
            from .muon import MuonWithAdamW, muon_settings  # needs a newer torch than the rest

            self.optimizer_cls_and_kwargs = MuonWithAdamW, muon_settings(args)
        self._budget = None
        if args.max_train_seconds is not None:
            self._budget = TimeBudget(args.max_train_seconds)
            self.add_callback(self._budget)
        self.add_callback(BeginRun(self))
        if isinstance(data_collator, AnchorOffsetCollator):
            self.add_callback(ContinueOffsets(self, data_collator))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """transformers' scheduler, or the one over `max_train_seconds`."""
        if self._budget is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        self._budget.resume(0.0)  # the schedule asks for the first step's rate at once
        warmup = self.args.get_warmup_steps(num_training_steps)
        self.lr_scheduler = budget_schedule(optimizer or self.optimizer, self._budget, warmup, num_training_steps)
        self._created_lr_scheduler = True  # `Trainer` then makes another for the next run
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Mean loss of a batch `input_ids`, `position_ids`, `labels` `[B, T]`, scaled so that processes average it."""
        labelled = inputs["labels"][:, 1:] != IGNORED
        count = labelled.sum() if num_items_in_batch is None else num_items_in_batch
        shifts = self._draw_shifts(min(self.args.shift_groups, len(labelled)))
        sums = self.loss_sums(model, inputs, shifts)
        count = torch.as_tensor(count, device=sums.total.device).clamp(min=1)
        if model.training:
            self._track(sums, labelled.sum())
        loss = sums.total / count
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the count is that of all, and gradients are averaged
        return (loss, {}) if return_outputs else loss

    def loss_sums(self, model: nn.Module, inputs: dict[str, torch.Tensor], shifts: list[int]) -> LossSums:
        """Loss sums of a batch whose rows are split evenly among cross-attention `shifts`."""
        draft = draft_of(self.accelerator.unwrap_model(model))
        bound, *_ = self._bound()
        states = read_target(self.target_model, bound.layer_idx, inputs["input_ids"], inputs["position_ids"])
        embeds = bound.embed(inputs["input_ids"]).detach()
        cos, sin = bound.position_embeddings(inputs["position_ids"], embeds)
        embeds, cos, sin, key, value = (x.to(draft.device, draft.dtype) for x in (embeds, cos, sin, *states[:2]))
        parts = torch.arange(len(embeds)).chunk(len(shifts))
        hidden = []
        for part, shift in zip(parts, shifts, strict=False):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            outputs = model(
                inputs_embeds=embeds[rows],
                position_embeddings=(cos[rows], sin[rows]),
                target_key=key[rows],
                target_value=value[rows],
                cross_attention_shift=shift,
                target_window=bound.layer_window,
            )
            hidden.append(outputs.last_hidden_state)
        return self._losses(torch.cat(hidden), states.hidden, inputs["labels"], bound)

    def _losses(
        self, hidden: torch.Tensor, teacher_hidden: torch.Tensor, labels: torch.Tensor, bound: BoundTarget
    ) -> LossSums:
        # The state at p predicts the token at p + 1; the last state of a row predicts nothing.
        hidden, labels = hidden[:, :-1], labels[:, 1:]
        mask = labels != IGNORED
        _, head, rows = self._bound()
        if rows is not None:
            labels = torch.where(mask, rows[labels.clamp(min=0)], IGNORED)
        device, dtype = head.weight.device, head.weight.dtype
        hidden = hidden.to(device)
        hidden = hidden if bound.norm is None else bound.norm(hidden).to(device)
        return chunked_loss(
            hidden.flatten(0, 1).to(dtype),
            head,
            labels.flatten().to(device),
            teacher_hidden[:, :-1].flatten(0, 1).to(device, dtype),
            mask.flatten().to(device),
            self.args.ce_weight,
            self.args.kl_weight,
            self.args.loss_chunk_elements,
            self.args.compile_loss,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`."""
        self._borrowed = None  # a checkpoint may bring another draft vocabulary
        return super().train(*args, **kwargs)

    def begin_run(self) -> None:
        """What a run counts begins at zero, or where the checkpoint it resumes left it."""
        record = read_record(self.state)
        self._began, self._earlier = time.monotonic(), record.get("seconds", 0.0)
        if self._budget is not None:
            self._budget.resume(record.get("budget_seconds", 0.0))
        self._micro_batch = (-1, 0)
        self._sums = {}
        if self.is_world_process_zero():  # the record is that of all processes together
            sums = {name: record[name] for name in ("ce", "kl", "positions") if name in record}
            self._sums = {name: torch.tensor(value, device=self.args.device) for name, value in sums.items()}
        elif "positions" in record:
            self._sums = {name: torch.tensor(0.0, device=self.args.device) for name in ("ce", "kl")}
            self._sums["positions"] = torch.tensor(0, device=self.args.device)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        record = {"seconds": self._earlier + time.monotonic() - self._began, **self._sums_of_all()}
        if self._budget is not None:
            record["budget_seconds"] = self._budget.passed
        write_record(self.state, record)
        super()._save_checkpoint(*args, **kwargs)

    def _bound(self) -> tuple[BoundTarget, FrozenHead, torch.Tensor | None]:
        """What the draft borrows, the head's matrix, and each token's row in the draft vocabulary; made once."""
        if self._borrowed is None:
            draft = draft_of(self.accelerator.unwrap_model(self.model))
            bound = bind(draft, self.target_model, mixed_precision=True)
            decoder = self.target_model.get_decoder()
            weight, bias = bound.head.matrix(draft.config.hidden_size, decoder.dtype, decoder.device)
            head = FrozenHead(weight, bias, bound.logit_softcap, self.args.loss_temperature)
            self._borrowed = bound, head, rows_of_tokens(bound.token_ids, draft.config.vocab_size)
        return self._borrowed

    def _draw_shifts(self, groups: int) -> list[int]:
        """Shifts of this process's part of the micro-batch; a function of seed, step and place in the step, so that a
        resumed run draws what an uninterrupted one does."""
        step, place = self._micro_batch
        place = place + 1 if step == self.state.global_step else 0
        self._micro_batch = (self.state.global_step, place)
        seed = hash((self.args.seed, self.state.global_step, place)) % 2**63
        generator = torch.Generator().manual_seed(seed)
        count = self.args.world_size * groups
        shifts = torch.randint(1, self.args.max_cross_attention_shift + 1, (count,), generator=generator).tolist()
        return shifts[self.args.process_index * groups :][:groups]

    def _track(self, sums: LossSums, positions: torch.Tensor) -> None:
        for name, value in {"ce": sums.ce, "kl": sums.kl, "positions": positions}.items():
            value = value.detach()
            self._sums[name] = self._sums[name].to(value.device) + value if name in self._sums else value

    def _sums_of_all(self) -> dict[str, float]:
        """Losses and positions since the last log, over all processes."""
        return {name: value.item() for name, value in self.accelerator.reduce(self._sums, "sum").items()}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the two losses, each per labelled position, and the number of those, since the last log."""
        if ("loss" in logs or "train_runtime" in logs) and self._sums:
            sums = self._sums_of_all()
            count = max(float(sums["positions"]), 1.0)
            logs = {**logs, "ce": sums["ce"] / count, "kl": sums["kl"] / count, "positions": float(sums["positions"])}
            self._sums = {}
        if "train_runtime" in logs and self._earlier:
            logs = {**logs, "earlier_runtime": self._earlier}
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the draft's card and `training_facts.json` into `output_dir` from what the run recorded; transformers'
        arguments are not used."""
        if not self.is_world_process_zero():
            return
        history = self.state.log_history
        taus = {
            name.removeprefix("eval_tau_"): value
            for entry in history
            for name, value in entry.items()
            if name.startswith("eval_tau_")
        }
        draft = draft_of(self.accelerator.unwrap_model(self.model))
        facts = training_facts(self.args, self.state)
        record = json.dumps({"facts": facts, "log": history}, indent=1, default=str)
        (Path(self.args.output_dir) / "training_facts.json").write_text(record, encoding="utf-8")
        card = make_model_card(draft.config, self._repo_name(), facts, taus)
        save_model_card(self.args.output_dir, card)

    def _repo_name(self) -> str:
        return self.args.hub_model_id or Path(self.args.output_dir).name


def _check_rows(rows: Any, collator: Any, vocab_size: int) -> None:
    """Refuse data without rows, and a padding token that the target has no embedding of."""
    if rows is not None and has_length(rows) and not len(rows):
        raise ValueError("`train_dataset` is empty, expected at least one row. Check the sources of the data.")
    if isinstance(collator, AnchorOffsetCollator) and collator.pad_token_id >= vocab_size:
        raise ValueError(
            f"`pad_token_id` is {collator.pad_token_id}, expected a token below the target's vocabulary size of "
            f"{vocab_size}. Padding is never seen, so any will do, such as 0."
        )
