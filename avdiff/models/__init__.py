"""Every class that is saved in a checkpoint.

Importing this package tells diffusers' loader about avdiff: components are then recorded in
`model_index.json` as `["avdiff", "ClassName"]` instead of by the path of their file, load from a
folder or a hub alike, and survive moves. The tables are not public names of diffusers;
tests/test_layout.py guards it, and pyproject.toml pins the minor release.
"""

from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES

LOADABLE_CLASSES.setdefault(
    "avdiff",
    {
        "ModelMixin": ["save_pretrained", "from_pretrained"],
        "SchedulerMixin": ["save_pretrained", "from_pretrained"],
        "PromptDomain": ["save_pretrained", "from_pretrained"],
    },
)
ALL_IMPORTABLE_CLASSES.update(LOADABLE_CLASSES["avdiff"])
