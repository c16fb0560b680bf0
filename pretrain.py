"""Pretrain a backbone.

    accelerate launch pretrain.py configs/pretrain/simmim_gcvit_tiny_in1k.yaml data.path=/data/imagenet out=runs/a

`pretrain` is the run from top to bottom, `fit` its loop; fine-tuning uses the same one. All that can differ between two
runs is a function of config, seed and step, so the same command goes on bit for bit where an interrupted run stopped.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from gcssl.badsteps import BadSteps
from gcssl.checkpoint import list_checkpoints, write_backbone
from gcssl.collapse import CollapseWatch
from gcssl.config import PretrainConfig, TrainConfig, load_config
from gcssl.data import open_data
from gcssl.errors import Preempted, UserError
from gcssl.eval.online import OnlineProbe, evaluated_encoder, online_probe
from gcssl.heartbeat import Heartbeat
from gcssl.loader import BatchPlan, Sizes, TrainSet, ViewMaker, batch_to_device, run_sizes, train_loader
from gcssl.log import RunLog, cut_after, say
from gcssl.meter import BadSamples, Meter
from gcssl.models.build import Backbone, backbone_info, from_config
from gcssl.models.load import check_exists, load_backbone
from gcssl.optim import groups_table, make_optimizer, param_groups, rates_at, set_lr
from gcssl.rng import INIT, MODEL, drop_noise, seed_torch
from gcssl.runfolder import RunFolder, broadcast, check_writable
from gcssl.runtime import StopSignal, check_accelerator, entry, main_process_first, make_accelerator
from gcssl.shard import check_shard, gathered, shard, whole, whole_tensor
from gcssl.ssl.base import Objective
from gcssl.ssl.gather import average_
from gcssl.ssl.objectives import SCHEMAS, make_objective
from gcssl.state import RunState, saves_at


def main(argv: list[str]) -> None:
    pretrain(load_config(PretrainConfig, argv, SCHEMAS))


def pretrain(cfg: PretrainConfig) -> Path:
    """Run or resume the pretraining that `cfg` describes; returns its run folder."""
    if not cfg.out:
        raise UserError("out: no run folder given; say out=runs/<name>")
    check_writable(cfg.out, cfg.data.path)
    accelerator = make_accelerator(cfg.train, cfg.runtime)
    couples = check_objective(cfg)
    backbone = build_pretrain_backbone(cfg)
    with main_process_first(accelerator):  # it fills the caches
        images = open_data(cfg.data, backbone.img_size).train
    say(images.describe(cfg.data.path))
    sizes = pretrain_sizes(cfg, len(images), accelerator.num_processes, couples)
    objective = make_objective(cfg, backbone, sizes.total_steps, sizes.steps_per_epoch)
    check_shard(cfg.train, objective)
    probe = online_probe(cfg, images, accelerator, sizes)
    with RunFolder(cfg.out, cfg, sizes.global_batch, accelerator, {"data": images.fingerprint}) as run:
        say(sizes.describe(cfg.train))
        undecayed = {f"encoder.{name}" for name in backbone.no_weight_decay()}
        groups = param_groups(objective.named_parameters(), cfg.train.weight_decay, undecayed)
        say(groups_table(groups))
        maker = ViewMaker(objective.draw, backbone.img_size, cfg.augment)
        dataset = TrainSet(images, maker, cfg.train.seed)

        def to_device(batch: dict[str, Any], step: int) -> dict[str, Any]:
            position = batch["position"]
            batch = batch_to_device(batch, accelerator.device, backbone.mean, backbone.std, cfg.augment)
            if cfg.model.drop_path > 0 and backbone.n_noise:
                shape = (len(batch["views"]), backbone.n_noise)
                batch["noise"] = drop_noise(cfg.train.seed, step, shape, position, accelerator.device)
            return batch

        fit(cfg, accelerator, run, objective, groups, dataset, sizes, to_device, probe)
        save_backbone(cfg, run, objective, sizes.total_steps, images.classes)
        say(f"backbone: {run.path / 'backbone.safetensors'}")
    return run.path


def check_objective(cfg: PretrainConfig) -> bool:
    """Refuse what the objective refuses before images are listed; returns whether it compares those of a batch."""
    with torch.device("meta"):  # without storage: it is dropped
        backbone = from_config(cfg.model)
        objective = make_objective(cfg, backbone, 1, 1)
    if cfg.encoder == "teacher" and not hasattr(objective, "teacher"):
        raise UserError(f"encoder=teacher: {cfg.objective.name} has no teacher; leave encoder out")
    return objective.couples_batch


def pretrain_sizes(cfg: PretrainConfig, n_images: int, world: int, couples: bool) -> Sizes:
    """Batch and steps on `world` processes; refuses accumulation where the objective would compute another loss."""
    sizes = run_sizes(cfg.train, n_images, world)
    if couples and (sizes.accumulate > 1 or sizes.global_batch < 2):
        fewer = ", a smaller train.global_batch" if cfg.train.global_batch is not None else ""
        keys = {key: getattr(cfg.objective, key, None) for key in ("view", "koleo_weight", "balance")}
        raise UserError(
            f"train.accumulate={sizes.accumulate}, batch_size={sizes.batch_size}: {cfg.objective.name}"
            f"{','.join(f' objective.{key}={x}' for key, x in keys.items() if x)}"
            " compares the images of a micro-batch, so it needs train.accumulate=1 and two at least; use more processes"
            f" (doctor and plan: doctor.processes=, plan.processes=){fewer} or a larger train.batch_size"
        )
    return sizes


def build_pretrain_backbone(cfg: PretrainConfig) -> Backbone:
    """The student before its first step: initialised from the seed, or from `model.weights`."""
    seed_torch(cfg.train.seed, INIT)
    if cfg.model.weights and not list_checkpoints(Path(cfg.out)):  # a checkpoint holds all that came from them
        check_exists(cfg.model.weights, "model.weights")
        backbone, info = load_backbone(cfg.model.weights, cfg.model, exact=True)
        say(f"model.weights: a new run from {cfg.model.weights} (step {info.get('step') or 'unknown'})")
        return backbone
    return from_config(cfg.model)


def fit(
    cfg: Any,
    accelerator: Accelerator,
    run: RunFolder,
    objective: Objective,
    groups: list[dict[str, Any]],
    dataset: TrainSet,
    sizes: Sizes,
    to_device: Callable[[dict[str, Any], int], dict[str, Any]],
    probe: OnlineProbe | None = None,
) -> None:
    """Train from the newest checkpoint, or the start, to the last step; long, so that a step reads in one place.

    What a step must not leave behind, and what ends a run, is in `skip` and `watch_collapse`.
    """
    train = cfg.train
    check_accelerator(accelerator, train, sizes.accumulate)
    objective.to(accelerator.device)
    bad_steps = BadSteps(run.path, train, objective)
    watch = CollapseWatch(objective.chance(sizes.global_batch))
    monitors = {"bad_steps": bad_steps, "collapse": watch}
    state = RunState(run, objective, make_optimizer(groups, train), accelerator, monitors, dataset.images.classes)
    step = state.resume()
    if bad_steps.norms and accelerator.num_processes * sizes.accumulate > 1:
        say("batch norm in the backbone: over each process's micro-batch, so other layouts of a batch train otherwise")
    run.start()  # nothing is left to refuse
    model, optimizer = prepared(objective, state.optimizer, accelerator, train)
    plan = BatchPlan(len(dataset), sizes, accelerator.process_index, train.seed, step)
    batches = train_loader(dataset, plan, cfg.data.workers, cfg.data.timeout)
    logged = (run.path, sizes.total_steps, step, cfg.log.every, cfg.log.trackers, accelerator.is_main_process)
    bad = BadSamples(run.path, step, len(dataset), cfg.data.max_bad)
    meter = Meter(accelerator, bad.seen)
    objective.train()
    if run.is_main:
        cut_after(bad_steps.path, step)
    with StopSignal(train.max_hours) as stop, RunLog(*logged) as log, Heartbeat(accelerator) as heartbeat, batches:
        if probe and probe.due(step) and not broadcast(log.holds(step, "online_rankme")):
            with log.pause():
                measure(probe, objective, step, log, stop)  # a signal ended it
        for batch in meter.waiting(batches):
            batch = to_device(batch, step)
            meter.note(batch)
            if meter.micro == 0:
                heartbeat.beat(step)
                bad_steps.begin()
            with accelerator.accumulate(model):
                seed_torch(train.seed, MODEL, step, accelerator.process_index, meter.micro)
                out = model(batch, step)
                out |= objective.grad_norms(out, step, cfg.log.every, sizes.accumulate, accelerator.scaler)
                accelerator.backward(out["loss"])
                meter.add(out)
                if not accelerator.sync_gradients:
                    continue
                objective.freeze(step)
                norm = accelerator.clip_grad_norm_(objective.parameters(), train.clip_grad or float("inf"))
                values = meter.reduce(whole_tensor(norm), stop.requested)  # the step's one all-reduce and host read
                if objective.loss_changes(step):
                    bad_steps.losses = []  # those of before say nothing of what a spike is now
                fault = bad_steps.judge(values)
                set_lr(optimizer, *rates_at(train, step, sizes))
                if not fault:
                    optimizer.step()
                optimizer.zero_grad()
            run.step = step = step + 1
            if fault:
                skip(step, fault, meter.indices, bad_steps, state, train.max_bad_steps)
            else:
                average_(bad_steps.running())  # so that teacher, checkpoint and resume have those of all processes
                if not accelerator.optimizer_step_was_skipped:
                    objective.after_step(step - 1)
            if values.pop("bad"):
                bad.record(step, meter.take_bad(), accelerator)
            stopping = values.pop("stop") and step < sizes.total_steps
            values |= schedules(objective, optimizer, step, sizes)
            values |= {"skipped": bad_steps.skipped, "bad_images": len(bad.seen)}
            if not fault and step > train.warmup_epochs * sizes.steps_per_epoch:
                watch_collapse(step, values, watch, state, train.on_collapse == "stop")
            log.step(step, values, sizes.global_batch, meter.take_wait())
            with log.pause():
                probing = probe is not None and probe.due(step)
                if objective.n_pictures and (step % sizes.steps_per_epoch == 0 or step == sizes.total_steps):
                    show_batch(objective, to_device(dataset.examples(objective.n_pictures), 0), step, log)
                if stopping or probing or step == sizes.total_steps or saves_at(step, cfg.checkpoint, sizes):
                    state.save(step, cfg.checkpoint, sizes.steps_per_epoch)
                if stopping:
                    accelerator.wait_for_everyone()  # else the launcher kills the one that saves
                    raise Preempted(stop.told(step, sizes.total_steps))
                if probe and probing:
                    measure(probe, objective, step, log, stop)
    say(log.summary())
    bad.summarise()
    accelerator.free_memory()  # another fit with this accelerator must not clip, scale or save what this one trained


def prepared(
    objective: Objective, optimizer: torch.optim.Optimizer, accelerator: Accelerator, train: TrainConfig
) -> tuple[Any, Any]:
    """What the loop calls in their places: under DDP on several processes, or cut over them. The optimizer's state is
    where torch wants it: step counts that Accelerate moved to a GPU would be read back in each step.
    """
    if train.compile:
        say("train.compile: the first steps wait for the compiler, minutes of them")
        compile_encoders(objective)
    if train.shard and accelerator.num_processes > 1:
        shard(objective, optimizer, accelerator)
        model = accelerator.prepare_model(objective, evaluation_mode=True)  # which leaves DDP out
        return model, accelerator.prepare_optimizer(optimizer, device_placement=False)
    return accelerator.prepare(objective, optimizer, device_placement=[True, False])


def compile_encoders(objective: Objective) -> None:
    """torch.compile of student and teacher, a graph a size: sizes are few, symbolic ones take minutes to trace."""
    torch._functorch.config.donated_buffer = False  # grad_norms goes through a graph that backward needs again
    for name, part in objective.named_children():
        if name in ("encoder", "teacher"):
            part.compile(dynamic=False)


def skip(step: int, fault: str, indices: list[Tensor], bad_steps: BadSteps, state: RunState, most: int) -> None:
    """Leave nothing of step number `step`; so many of them in a row end the run."""
    bad_steps.skip(step, fault, indices, state.accelerator)
    in_a_row = bad_steps.in_a_row
    if len(in_a_row) >= most:
        told = f"step {step}: {len(in_a_row)} steps in a row were skipped, now by a {fault}"
        state.give_up(in_a_row[0]["step"] - 1, told, in_a_row)


def watch_collapse(step: int, values: dict[str, float], watch: CollapseWatch, state: RunState, stop: bool) -> None:
    """Say which signs of a collapse stayed, and end the run where one should."""
    for sign in watch.see(values):
        told = f"step {step}: collapse? for {watch.patience} steps {sign.told}"
        if stop:
            state.give_up(step, told, [])
        say(told)


def measure(probe: OnlineProbe, objective: Objective, step: int, log: RunLog, stop: StopSignal) -> None:
    """The online probe after a checkpoint: a signal ends it at once, and the next start repeats it."""
    with stop.at_once(step, log.total_steps), gathered(objective):
        found = probe(step, objective)
    log.scalars(step, found)


def show_batch(objective: Objective, batch: dict[str, Any], step: int, log: RunLog) -> None:
    """Original, hidden and reconstructed images, from objectives that reconstruct."""
    with gathered(objective), torch.no_grad(), torch.compiler.set_stance("force_eager"):  # the others wait
        if log.shows_images:
            objective.eval()
            log.images(step, objective.pictures(batch))
            objective.train()


def schedules(objective: Objective, optimizer: torch.optim.Optimizer, step: int, sizes: Sizes) -> dict[str, float]:
    """What was in force in the update that made `step`: lr of the last layer, weight decay, the teacher's momentum."""
    groups = optimizer.param_groups
    decay = max(group["weight_decay"] for group in groups)
    values = {"epoch": step / sizes.steps_per_epoch, "lr": max(group["lr"] for group in groups), "wd": decay}
    return values | objective.schedules(step - 1)


def save_backbone(
    cfg: PretrainConfig, run: RunFolder, objective: Objective, step: int, classes: list[str] | None
) -> None:
    encoder = evaluated_encoder(cfg, objective)
    which = cfg.encoder or objective.default_encoder
    told = {"encoder": which, "class_names": classes, "trained_on": run.facts["data"]}
    info = backbone_info(encoder, step=step, objective=cfg.objective.name, **told)
    weights = whole(encoder.state_dict())
    if run.is_main:
        write_backbone(run.path, weights, info)


if __name__ == "__main__":
    entry(main)
