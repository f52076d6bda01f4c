"""Decides what is stored of each layer, and what of a hit is restored. Runs anywhere: no torch, no SGLang.

hf_config → shape (needs transformers only to complete a config.json)
shape, machine → cost → timeline → save (what to store), load (what to restore, what to prefill meanwhile)
                   ↑
                 rate_tracker: rates corrected by what real loads took
"""
