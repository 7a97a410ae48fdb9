# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_dms[peft,quantization]"]
# ///
"""Run a recipe on a machine of the Hub, for those without a GPU; the result is pushed to a repository of yours.

hf jobs uv run --flavor a10g-small --secrets HF_TOKEN examples/hf_jobs.py quickstart.yaml \\
    model.path=HuggingFaceTB/SmolLM2-135M hub.repo_id=you/smaller

The first argument is the name of a packaged recipe (`hf-dms recipes`); section.key=value overrides follow. model.path
must be an id on the Hub, because the job has no folder models/; data.path may be one. Until hf_dms is on the package
index, replace the dependency above by the URL of a wheel.
"""

import sys

from hf_dms.cli import main

if not any(word.startswith("hub.repo_id=") for word in sys.argv):
    sys.exit("Add hub.repo_id=you/name: what is not pushed is lost when the job ends.")
sys.exit(main(["prune", *sys.argv[1:], "output.path=outputs/job"]))
