"""Stage `preprocess`: the arrays of one task that training reads."""

from pipeline.grid.freshness import Freshness, data_folder, raw_folder, summary_file
from pipeline.grid.params import Params, section_of
from pipeline.grid.settings import params_file, read_yaml
from pipeline.host.files import write_json
from schoenbat.errors import UserError
from schoenbat.lra.data.arrays import Dataset
from schoenbat.lra.tasks import TASKS


def run(params: Params, task: str) -> None:
    """Encode the raw files of `task` into data/processed/PROFILE/TASK.

    A copy of meta.json, with the baselines of the task and what the data was made from, is left beside the results.
    """
    section = section_of(params.task, "task", task)
    raw = raw_folder(task)
    if not (raw / "provenance.json").is_file():
        raise UserError(f"no raw data for {task} in {raw}; get it with: schoenbat-exp download --task {task}")
    out = data_folder(params.profile, task)
    made_from = Freshness(read_yaml(params_file())).made_from(task)
    print(f"{task}: preparing {out}", flush=True)
    built = TASKS.get(task)(section.data)
    meta = built.prepare(raw, out)
    baselines = built.baselines(Dataset(out))
    write_json(summary_file(params.profile, task), {**meta, "baselines": baselines, "made_from": made_from})
    counts = ", ".join(f"{split} {count}" for split, count in meta["splits"].items())
    print(f"{task}: {meta['label']}: {counts}; tokens a text: median {meta['lengths']['median']:g}")
    for rule, accuracy in baselines.items():
        print(f"{task}: {100 * accuracy:.1f} % of the test set by the rule: {rule}")
    for note in meta["notes"]:
        print(f"{task}: {note}")
