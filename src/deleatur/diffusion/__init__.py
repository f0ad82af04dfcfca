"""The only room that knows diffusers: load, encode, predict, sample, select, finetune, invert, overlay."""
