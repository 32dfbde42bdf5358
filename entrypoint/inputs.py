"""The inputs that a job may have besides its base model and data set: found, and looked at before the fetch.

channel   options of sd-scripts
vae       vae
reg       reg_data_dir
weights   network_weights, base_weights: names of files in the channel
config    sample_prompts, dataset_config: names of files beside the configuration
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from entrypoint import checkpoint, dataset, files
from entrypoint.checkpoint import Header, WrongFile
from entrypoint.dataset import DataSet
from entrypoint.failures import Problem, StorageError, Unfit, collecting
from entrypoint.files import File, Single
from entrypoint.request import JobRequest, Location, Source
from entrypoint.storage import Storage
from kohya import config, dataset_config, networks
from kohya.config import Kind, Merged, Setting
from kohya.dataset_config import DatasetConfig
from kohya.problem import counted

BESIDE = ("dataset_config", "sample_prompts")  # name a file beside the configuration
PLACED = frozenset({"vae", "reg_data_dir"})  # the channel's, whatever the user wrote
_CHANNELS = {"vae": "vae", "reg_data_dir": "reg", "network_weights": "weights", "base_weights": "weights"}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_DRAWING = ("sample_at_first", "sample_every_n_epochs", "sample_every_n_steps")


@dataclass(frozen=True)
class Extras:
    """What was found."""

    weights: Mapping[str, tuple[Single, ...]]  # by option: vae, network_weights, base_weights
    prompts: tuple[str, str] | None  # name and content of the sample prompts
    dataset_config: DatasetConfig | None


def find(
    request: JobRequest, folder: Location | None, kind: Kind | None, merged: Merged, storage: Storage
) -> tuple[Extras, Merged, list[Problem]]:
    """Every optional input, the configuration with the options that stand for them, and all that is wrong.

    `folder` holds the files beside the configuration. `kind`: None where the base model could not be told.
    """
    problems = [*_without_channel(request, merged), *_drawing_problems(merged)]
    weights: dict[str, tuple[Single, ...]] = {}
    prompts = described = None
    with collecting(problems):
        if request.vae is not None:
            vae = _vae(request.vae, storage)
            weights["vae"] = (vae,)
            merged = config.change(merged, {"vae": files.name_of(vae.file)}, request.vae.where)
    if request.reg is not None and "dataset_config" not in merged.settings:  # which names its folders
        merged = config.change(merged, {"reg_data_dir": str(request.reg.location)}, request.reg.where)
    with collecting(problems):
        if request.weights is not None:
            merged, found, wrong = _loras(request.weights, kind, merged, storage)
            weights |= found
            problems += wrong
    if folder is None and request.config is not None:  # which could not be read, and has told why
        return Extras(weights, None, None), merged, problems
    with collecting(problems):
        if setting := merged.settings.get("sample_prompts"):
            prompts = _prompts(setting, folder, storage)
            if not any((merged.values.get(name) or 0) > 0 for name in _DRAWING):
                note = f"{setting.where}: nothing says when to draw, as sample_every_n_epochs = 1 would"
                merged = replace(merged, notes=(*merged.notes, note))
    with collecting(problems):
        if setting := merged.settings.get("dataset_config"):
            described = _dataset_config(setting, folder, merged, request, storage)
    return Extras(weights, prompts, described), merged, problems


def pictures(
    request: JobRequest, source: Source, merged: Merged, extras: Extras, storage: Storage
) -> tuple[DataSet, Mapping[str, File], list[Problem]]:
    """The data set or the regularisation pictures, their files by path below it, and all that is wrong.

    Raises Unfit and StorageError where the folder cannot be listed.
    """
    found = files.listing(source, storage)
    sizes, where = found.sizes, str(source.location)
    values, is_reg = merged.values, source is request.reg
    if "dataset_config" in values:  # which has told its own problems, if it cannot be read
        told = extras.dataset_config.folders if extras.dataset_config else ()
        wanted = [folder for folder in told if folder.is_reg == is_reg]
        data_set, problems = dataset.inspect_folders(
            sizes, where, wanted, allow_missing_captions=request.may_lack_captions
        )
    else:
        data_set, problems = dataset.inspect(
            sizes,
            where,
            caption_extension=str(values.get("caption_extension", ".txt")),
            allow_missing_captions=request.may_lack_captions or is_reg,
            flat=not is_reg,
        )
    return data_set, found.only(data_set.places), problems


def _without_channel(request: JobRequest, merged: Merged) -> Iterator[Problem]:
    """Options that name a file or folder which the job was not given."""
    given = {"vae": request.vae, "reg": request.reg, "weights": request.weights}
    for option, channel in _CHANNELS.items():
        if option in merged.settings and given[channel] is None:
            wrong = f"{option} names a file or folder, and there is no channel {channel}"
            fix = f"Add a channel {channel}, or type --{channel}_uri=s3://BUCKET/{channel}, or remove it"
            yield Problem(merged.settings[option].where, wrong, fix)


def _drawing_problems(merged: Merged) -> Iterator[Problem]:
    """sd-scripts fails at its first sample without prompts, and draws none where it is not told when."""
    asked = [name for name in _DRAWING if (merged.values.get(name) or 0) > 0]
    prompts = merged.settings.get("sample_prompts")
    if asked and prompts is None:
        wrong = f"{asked[0]} asks for pictures, and there are no sample_prompts to draw"
        fix = 'Put a text file beside the configuration, and write sample_prompts = "prompts.txt"'
        yield Problem(merged.settings[asked[0]].where, wrong, fix)


def _vae(source: Source, storage: Storage) -> Single:
    """The VAE's file. Raises Unfit where it is none."""
    file = files.only(source, (".safetensors", *_PICKLES), "VAE", storage)
    fix = "Give a VAE in the original layout as one .safetensors file"
    with _explained(source, file, fix), files.opened(file, storage) as opened:
        checkpoint.identify_vae(_header(opened, file))
    return Single(file, source.streamed)


def _loras(
    source: Source, kind: Kind | None, merged: Merged, storage: Storage
) -> tuple[Merged, dict[str, tuple[Single, ...]], list[Problem]]:
    """The LoRAs of a channel that the options name; a single one that none names is network_weights."""
    there = files.matching(source, (".safetensors",), "LoRA", storage)
    asked = [option for option in ("base_weights", "network_weights") if option in merged.settings]
    if not asked:
        files.sole(there, source, 'Name them: network_weights = "NAME", or base_weights = ["NAME"]')
        merged = config.change(merged, {"network_weights": next(iter(there))}, source.where)
        asked = ["network_weights"]
    plain = merged.values.get("network_module") == "networks.lora" and not merged.values.get("network_args")
    problems: list[Problem] = []
    found: dict[str, tuple[Single, ...]] = {}
    for option in asked:
        value, at = merged.values[option], merged.settings[option].where
        names = value if isinstance(value, list) else [value]
        for name in names:
            if name not in there:
                wrong = f"{option} names {name!r}, which is not in {source.where}; there: {', '.join(there)}"
                problems.append(Problem(at, wrong, f'Write {option} = "{next(iter(there))}"'))
                continue
            with collecting(problems):
                header, alpha = _lora(there[name], source, kind, storage)
                if option == "network_weights" and plain and kind is not None:
                    merged = _gone_on_from(header, alpha, _at(source, there[name]), kind, merged)
        found[option] = tuple(Single(there[name], source.streamed) for name in names if name in there)
    multipliers = merged.values.get("base_weights_multiplier") or []
    if len(multipliers) > len(found.get("base_weights", ())):
        numbers = counted(len(multipliers), "number")
        wrong = f"base_weights_multiplier has {numbers}, more than there are base_weights"
        problems.append(Problem(merged.settings["base_weights_multiplier"].where, wrong, "Give one for each"))
    return merged, found, problems


def _lora(file: File, source: Source, kind: Kind | None, storage: Storage) -> tuple[Header, float | None]:
    """The header of a LoRA for this kind of base model, and its alpha. Raises Unfit where it is none."""
    fix = "Give a LoRA as kohya's sd-scripts saves it"
    with _explained(source, file, fix), files.opened(file, storage) as opened:
        header = _header(opened, file)
        told = checkpoint.identify_lora(header)
        alpha = checkpoint.alpha(opened, opened.tell(), header)
    if kind not in (None, told):
        wrong = f"it is a LoRA for {told}, and the base model is {kind}"
        raise Unfit([Problem(_at(source, file), wrong, f"Give a LoRA for {kind}")])
    return header, alpha


def _gone_on_from(header: Header, alpha: float | None, where: str, kind: Kind, merged: Merged) -> Merged:
    """The configuration of a training that goes on from a LoRA. Raises Unfit where the two do not agree.

    sd-scripts ends with an error on another rank, but only when the base model is loaded. On another alpha
    it trains with the configuration's and saves the file's (networks/lora.py: scale and the buffer alpha),
    and so a LoRA that works at another strength than the one it was trained at.
    """
    values = merged.values
    wanted = set(
        networks.modules(
            kind,
            unet=not values.get("network_train_text_encoder_only"),
            text_encoders=not values.get("network_train_unet_only"),
        )
    )
    found = checkpoint.modules_of(header)
    ranks = checkpoint.ranks(header, wanted)
    left_out = found - wanted
    if values.get("dim_from_weights"):  # the file decides what is trained of each part
        left_out = {name for name in left_out if networks.part(name) not in map(networks.part, wanted)}
    if left_out:
        note = f"{where}: {len(left_out)} of its {len(found)} modules are not trained, and left out"
        merged = replace(merged, notes=(*merged.notes, f"{note}, {min(left_out)} first"))
    if values.get("dim_from_weights"):
        if missing := wanted - found:
            wrong = f"it lacks {len(missing)} of {len(wanted)} modules to train, {min(missing)} first"
            fix = "Remove dim_from_weights, or train only what it has, as with network_train_unet_only = true"
            raise Unfit([Problem(where, wrong, fix)])
        if len(ranks) == 1:  # for the metadata, which sd-scripts takes from its options
            rank = next(iter(ranks))
            taken = {"network_dim": rank, "network_alpha": float(rank if alpha is None else alpha)}
            merged = config.change(merged, taken, "dim_from_weights")
        return merged
    dim = values.get("network_dim", 4)
    if ranks - {dim}:
        wrong = f"it has rank {', '.join(map(str, sorted(ranks)))}, and network_dim is {dim}"
        fix = f"Write network_dim = {max(ranks)}, or dim_from_weights = true"
        raise Unfit([Problem(where, wrong, fix)])
    scale = values.get("network_alpha", 1) or dim
    if alpha is not None and abs(alpha - scale) > 1e-3 * scale:  # of half precision
        wrong = f"its alpha is {alpha:g}, and network_alpha is {scale:g}: the LoRA's strength would be wrong"
        raise Unfit([Problem(where, wrong, f"Write network_alpha = {alpha:g}, or dim_from_weights = true")])
    return merged


def _header(opened: Any, file: File) -> Header:
    if files.name_of(file).endswith(_PICKLES):
        raise WrongFile("it is a pickle, which can run code when it is loaded")
    return checkpoint.read_header(opened, files.size(file))


def _at(source: Source, file: File) -> str:
    return f"{source.where}: {files.name_of(file)}"


@contextmanager
def _explained(source: Source, file: File, fix: str) -> Iterator[None]:
    """Tell what is wrong with a file as a problem of the channel that it came from."""
    where = _at(source, file)
    try:
        yield
    except WrongFile as error:
        raise Unfit([Problem(where, str(error), fix)]) from error
    except OSError as error:
        wrong, fix = f"it cannot be read ({error.strerror})", "Check its path and permissions"
        raise Unfit([Problem(where, wrong, fix)]) from error


def _text_beside(
    setting: Setting, folder: Location | None, endings: tuple[str, ...], storage: Storage
) -> tuple[str, str]:
    """Where the file that an option names lies, and its content. Raises Unfit."""
    given = str(setting.value)
    name = PureWindowsPath(given).name  # understands both kinds of path
    fix = f'Put it beside the configuration, and write {setting.name} = "{name}"'
    if folder is None:
        wrong = f"{setting.name} names a file beside the configuration, and there is no channel config"
        raise Unfit([Problem(setting.where, wrong, f"{fix}; or type --config_uri=s3://BUCKET/config")])
    if not dataset_config.lies_below(given):
        wrong = f"{setting.name} = {given!r} is no file that lies beside the configuration"
        raise Unfit([Problem(setting.where, wrong, fix)])
    if not given.endswith(endings):
        wrong = f"{setting.name} = {given!r} has none of the endings {', '.join(endings)}"
        raise Unfit([Problem(setting.where, wrong, "Save it as one of these")])
    try:
        file = files.beside(folder, str(PurePosixPath(given)), storage)
    except Unfit as error:
        raise Unfit([_named(setting, problem) for problem in error.problems]) from error
    except StorageError as error:
        raise StorageError(_named(setting, error.problem)) from error
    where = f"{setting.where}: {files.name_of(file)}"
    return where, files.text_of(file, where, storage)


def _named(setting: Setting, problem: Problem) -> Problem:
    """A file's problem, with the option that names the file."""
    return replace(problem, where=f"{setting.where}: {problem.where}")


def _prompts(setting: Setting, folder: Location | None, storage: Storage) -> tuple[str, str]:
    """Name and content of the sample prompts. Raises Unfit where sd-scripts would find none in it."""
    where, text = _text_beside(setting, folder, (".txt", ".json", ".toml"), storage)
    name = PurePosixPath(str(setting.value)).name
    try:
        found = read_prompts(name, text)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        wrong = f"it holds no sample prompts ({type(error).__name__}: {error})"
        raise Unfit([Problem(where, wrong, "Write a text file with one prompt a line")]) from error
    if not found:
        raise Unfit([Problem(where, "there is no prompt in it", "Write one prompt a line")])
    if any(" --cn " in one if isinstance(one, str) else "controlnet_image" in one for one in found):
        wrong = "a prompt names a picture for ControlNet, and there is no channel for it"
        raise Unfit([Problem(where, wrong, "Remove it")])
    return name, text


def read_prompts(name: str, text: str) -> list[Any]:
    """The prompts as sd-scripts reads them (train_util.py:6410-6436 of v0.10.1). Raises various errors."""
    if name.endswith(".txt"):
        return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if name.endswith(".json"):
        found = json.loads(text)
    else:
        prompt = config.parse(text)["prompt"]
        found = [dict(**prompt, **subset) for subset in prompt["subset"]]
    if not isinstance(found, list) or not all(isinstance(one, str | dict) for one in found):
        raise ValueError("expected a list of texts or objects")
    return found


def _dataset_config(
    setting: Setting, folder: Location | None, merged: Merged, request: JobRequest, storage: Storage
) -> DatasetConfig:
    """The dataset_config. Raises Unfit with all that is wrong with it."""
    where, text = _text_beside(setting, folder, (".toml",), storage)
    found, problems = dataset_config.read(text, where, merged.values)
    subsets = [one for table in found.content.get("datasets", ()) for one in table["subsets"]]
    masked, values = merged.settings.get("masked_loss"), merged.values
    if (
        masked
        and masked.value
        and not any(one.get("alpha_mask", values.get("alpha_mask")) for one in subsets)
    ):
        wrong = "masked_loss needs alpha_mask, which no subset has"
        problems.append(
            Problem(masked.where, wrong, "Set alpha_mask = true in a subset, or remove masked_loss")
        )
    wants = any(one.is_reg for one in found.folders)
    if wants and request.reg is None:
        wrong, fix = "a subset with is_reg wants a channel reg", "Add a channel reg, or type --reg_uri=…"
        problems.append(Problem(where, wrong, fix))
    if not problems and request.reg is not None and not wants:
        wrong = f"dataset_config names no folder of {request.reg.where}, which would be ignored"
        problems.append(Problem(where, wrong, "Add a subset with is_reg = true"))
    if problems:
        raise Unfit(problems)
    return found
