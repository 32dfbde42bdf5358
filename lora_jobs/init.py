"""`lora init`: writes a job file, with comments, to fill in. What a flag gives is filled in already.

    lora init --base-model model.safetensors --dataset pictures --output s3://my-bucket/loras \\
        --role arn:aws:iam::123456789012:role/training \\
        --image 123456789012.dkr.ecr.eu-central-1.amazonaws.com/sagemaker-kohya:0.1.0-cuda13

It never writes over a file that is there.
"""

import argparse
import json
import re
import tomllib
from pathlib import Path

from entrypoint import console
from kohya.problem import Problem
from lora_jobs.errors import LoraError

# By kind: an instance whose GPU and main memory suffice for the preset. The A10G has bf16. The smallest g5
# has 16 GB of main memory, which SDXL does not fit into while it is loaded (configs/gpu/a10g.toml).
_INSTANCES = {"sd15": "ml.g5.xlarge", "sdxl": "ml.g5.2xlarge"}
_RESOLUTIONS = {"sd15": "512,512", "sdxl": "1024,1024"}
_LONG = {"sd15": "Stable Diffusion 1.5", "sdxl": "Stable Diffusion XL"}

_TEXT = """\
# A LoRA for {long}, as one SageMaker training job.
#
#   lora check {file}     whether it is fit, before anything is paid for
#   lora submit {file}    sends local inputs to S3 and starts the job
#   lora run {file}       the same job in the image on this machine
#
# Words in capitals are to be filled in. A path is one from this file on.

name = {name}  # also the LoRA's: lower-case letters, digits, hyphens

# One .safetensors or .ckpt file: a path, or s3://…
base_model = {base_model}

# Captioned pictures in folders N_name, N being how often a picture is repeated in an epoch: a path, or s3://…
dataset = {dataset}

# Below it appear inputs/, checkpoints/, tensorboard/, and a folder a job with the LoRA and all else.
output = {output}

# config = "training.toml"   # sd-scripts' options, instead of [training] or below it
# vae = "vae.safetensors"
# reg = "regularisation"     # regularisation pictures
# weights = "loras"          # LoRAs to go on from, or to merge
# tagger = "tagger"          # model.onnx and selected_tags.csv, for caption = "wd14"

[sagemaker]
image = {image}  # what make image push prints
role = {role}  # lora policy {file} prints what it must be allowed
instance = {instance}  # {gpu}
{region}spot = true               # cheaper; a job that is interrupted goes on from its newest state
max_runtime_hours = 24    # then it is stopped, and keeps what it has
# max_wait_hours = 48     # for the wait for a spot instance and the run together
# volume_gb = 100         # instead of what the inputs need
# price_per_hour = 1.21   # of the instance: lora watch then tells what was spent
# subnets = ["subnet-0123abcd"]
# security_groups = ["sg-0123abcd"]
# volume_kms_key = "alias/NAME"
# output_kms_key = "alias/NAME"   # the LoRAs are then there at the job's end only
# network_isolation = true     # the job reaches nothing but its channels
# keep_alive_minutes = 30      # a warm pool, with spot = false
# tags = {{ project = "loras" }}

# Hyperparameters of the job, and sd-scripts' options under their own names. What is not here comes from
# configs/{kind}.toml.
[training]
{trainer}max_train_epochs = 10     # fewer for more pictures
resolution = "{resolution}"
network_dim = {dim}          # the rank: 8 for one simple thing, more for a character or style
network_alpha = {alpha}         # at half the rank learning rates act half as strong
# sample_prompts = "prompts.txt"   # with sample_every_n_epochs = 1; a file beside that of config
# allow_missing_captions = true
"""
_PLACEHOLDERS = {
    "base_model": "s3://BUCKET/base/model.safetensors",
    "dataset": "s3://BUCKET/pictures",
    "output": "s3://BUCKET/loras",
    "image": "ACCOUNT.dkr.ecr.REGION.amazonaws.com/sagemaker-kohya:TAG",
    "role": "arn:aws:iam::ACCOUNT:role/ROLE",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, nargs="?", default=Path("job.toml"), metavar="FILE")
    parser.add_argument("--kind", choices=tuple(_INSTANCES), default="sd15", help="of the base model")
    parser.add_argument("--name", help="the job's and the LoRA's; the file's name unless set")
    for key in _PLACEHOLDERS:
        parser.add_argument(f"--{key.replace('_', '-')}", help="filled in")
    parser.add_argument("--instance", help="filled in")
    parser.add_argument("--region", help="filled in")
    parser.add_argument("--trainer", choices=("sd-scripts", "builtin"), help="filled in")
    parser.add_argument(
        "--set",
        action="append",
        type=_line,
        default=[],
        metavar="OPTION=VALUE",
        help="a line of [training]; more than once",
    )


def run(arguments: argparse.Namespace) -> int:
    file: Path = arguments.file
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text(arguments))
    except FileExistsError as error:
        raise LoraError(
            Problem(str(file), "it is there already", "Name another file, or remove it")
        ) from error
    console.say(f"wrote {file}")
    console.say(f"next: lora check {file}")
    return 0


def text(arguments: argparse.Namespace) -> str:
    """The job file's content."""
    kind, file = arguments.kind, arguments.file
    values = {key: getattr(arguments, key) or hint for key, hint in _PLACEHOLDERS.items()}
    values["name"] = arguments.name or _name(file.stem)
    values["instance"] = arguments.instance or _INSTANCES[kind]
    folder = file.absolute().parent
    for key in ("base_model", "dataset"):
        if "://" not in values[key]:  # typed from here on, written from the job file on
            values[key] = _from(folder, Path(values[key]))
    region, trainer = arguments.region, arguments.trainer
    alpha = {"sd15": 16, "sdxl": 8}[kind]
    content = _TEXT.format(
        **{key: json.dumps(value, ensure_ascii=False) for key, value in values.items()},
        file=file.name,
        kind=kind,
        long=_LONG[kind],
        gpu="one A10G with 24 GB" if not arguments.instance else "as asked for",
        region=f'region = "{region}"\n'
        if region
        else '# region = "eu-central-1"   # instead of AWS_REGION\'s\n',
        trainer=f'trainer = "{trainer}"\n' if trainer else "",
        resolution=_RESOLUTIONS[kind],
        dim=2 * alpha,
        alpha=alpha,
    )
    for name, value in arguments.set:
        content = _with(content, name, value)
    return content


def _line(given: str) -> tuple[str, str]:
    """The name and the value of --set."""
    name, equals, value = (part.strip() for part in given.partition("="))
    if not equals or not re.fullmatch(r"[\w-]+", name, re.ASCII):
        raise argparse.ArgumentTypeError(f"{given!r} is not OPTION=VALUE")
    return name, value


def _with(content: str, name: str, value: str) -> str:
    """The content with a line of [training]: in the place of the one that is there, or after the others."""
    try:
        told = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        told = {}
    if told.keys() != {"value"} or not isinstance(told["value"], bool | int | float | str | list):
        value = json.dumps(value, ensure_ascii=False)  # a text, as it stands in a shell
    top, table, training = content.partition("[training]\n")
    line = f"{name} = {value}\n"
    replaced, count = re.subn(rf"(?m)^(?:# )?{re.escape(name)} = .*\n", lambda _: line, training, count=1)
    return f"{top}{table}{replaced if count else training + line}"


def _name(stem: str) -> str:
    """A job's name made of a file's."""
    letters = (letter if letter.isascii() and letter.isalnum() else "-" for letter in stem.lower())
    return "".join(letters).strip("-")[:40].strip("-") or "lora"


def _from(folder: Path, path: Path) -> str:
    """A path as it is written in a file in `folder`: below it without the folder, elsewhere whole."""
    whole = path.expanduser().absolute()
    return whole.relative_to(folder).as_posix() if whole.is_relative_to(folder) else whole.as_posix()
