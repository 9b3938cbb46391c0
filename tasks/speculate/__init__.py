"""Speculative decoding: heads draft tokens ahead, the model verifies them in one pass.

It travels: a registered version carries this folder, so modules import each other relatively and
need torch, transformers, safetensors and numpy alone.
"""
