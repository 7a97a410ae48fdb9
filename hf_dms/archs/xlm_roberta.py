"""XLM-RoBERTa and CamemBERT: RoBERTa with other vocabularies."""

from dataclasses import replace

from .roberta import ROBERTA

XLM_ROBERTA = replace(ROBERTA, model_type="xlm-roberta")
CAMEMBERT = replace(ROBERTA, model_type="camembert")
