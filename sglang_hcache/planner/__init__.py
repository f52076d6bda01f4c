"""Decides what is stored of each layer, and what of a hit is restored. Pure Python and numpy: runs anywhere.

shape, machine → cost → timeline → save (what to store), load (what to restore, what to prefill meanwhile)
                   ↑
                 rate_tracker: rates corrected by what real loads took
"""
