"""A report as `hf-dms prune` writes it, and the content of a page."""

from html.parser import HTMLParser

from hf_dms.report.numbers import as_written

NASTY = (
    "<script>document.title='owned'</script>\"'><img src=x onerror=\"document.title='owned'\"> ünïcödé 数 {{ 7 * 7 }}"
)
STEPS = range(2, 42, 2)


def numbers(**more):
    return {"num_params": 1000, "macs_per_token": 900, "kv_bytes_per_token": 64} | more


def make_report(task="text-generation", layers=6, text="a prompt"):
    """A report as `hf-dms prune` would write it, with a text wherever it holds words of a user."""
    metric = "perplexity" if task == "text-generation" else "accuracy"
    quality = {metric: 0.75, "stderr": 0.01, "difference": -0.1, "difference_stderr": 0.02}
    speed = {"tokens_per_second" if metric == "perplexity" else "texts_per_second": 50.0}
    search = [
        {"step": step, "task_loss": 3 + 1 / step, "resource": 1 - step / 100, "target": 1 - step / 110, "loss": 3.0}
        | {"kept/mlp": 20 - step / 8, "kept_min/mlp": 20 - step / 4, "kept_max/mlp": 20.0, "kept/layers": 6.0}
        for step in STEPS
    ]
    samples = [{"input": text, "outputs": {"dense": text + text, "recovered": text}}]
    if metric == "accuracy":
        probabilities = {"dense": 0.9, "recovered": 0.4}
        samples = [{"input": text, "label": text, "outputs": {"dense": text, "recovered": "no"}}]
        samples[0]["probabilities"] = probabilities
    return as_written(
        {
            "recipe": {
                "model": {"path": f"org/{text}", "task": task},
                "dms": {"target": 0.6, "resource": "params", "resource_scope": "model", "pipeline": "p"},
                "eval": {"prompt": text},
            },
            "seed": 0,
            "versions": {"hf_dms": "0.1.0"},
            "protocol": f"8 held-out {text}",
            "dense": numbers(**{metric: 0.8, "stderr": 0.01}, **speed),
            "pruned": numbers(num_params=600, **quality, **speed),
            "recovered": quality,
            "sizes": {"mlp": [20, 7, 0, 13, 1, 20][:layers], "hidden": [18], "layers": [layers - 1]},
            "units": {"mlp": 20, "hidden": 24, "layers": layers},
            "kept_layers": [layer for layer in range(layers) if layer != 2],
            "layout": "per_layer",
            "search": search,
            "masks": {"soft": quality},
            "samples": samples,
            "model_class": "DmsLlamaForCausalLM" if metric == "perplexity" else "DmsBertForSequenceClassification",
            "seconds": 61,
        }
    )


class Tags(HTMLParser):
    """Tags of a page with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data
