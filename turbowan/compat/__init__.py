"""The official scripts' command lines: `python -m turbowan.compat.wan2_1_t2v_infer` and `…wan2_2_i2v_infer` take the
flags of thu-ml/TurboDiffusion's `wan2.1_t2v_infer.py` and `wan2.2_i2v_infer.py` unchanged.

What to expect on the same GPU: the official code's picture, not its bytes. In parts:

Bit for bit the same, given equal outputs of the networks: the noise (the same draws in the same order, on the GPU), the
times, every update of the state (float64, fresh noise weighted in float32), the latent and the time the transformer
gets (bfloat16), the expert for each step, all sizes (adaptive ones too), the bytes that decoded pixels become. The
picture of image-to-video is resized by PyTorch on bytes, which is what torchvision calls there (not compared with it
here). The rounding of the time matters most: without it the recorded four-step run ends 10.6 % away from the official
one, with it 0.3 %.

The same up to rounding: the transformer. Against recorded runs of the official code on an H200 (small random weights)
one evaluation is off by 0.5 % with a bf16 file and 0.8 % with an int8 one, the latent after four steps by 0.3 %
computed in float32 and 0.8 % in bfloat16. Two things are set here that are not our defaults: the LayerNorm variance of
the fast kernel, unless `--default_norm` is given (the wrong one is 8.2 % away at a width that is no power of two), and,
for SageSLA on Hopper, blocks of 64 x 128 tokens (others are 4.6 % away). What is left:

- an int8 product is rounded once, after its bias; there before it too;
- with `--num_samples` above 1, int8 blocks of the activations end with their sample; there they reach into the next;
- among equal block scores the lowest index is kept; there the GPU's top-k decides.

Different on purpose: sizes, quantisation and SLA are read from the file, so `--model` and `--quant_linear` need not
match it; dense attention runs on an SLA file and `--default_norm` on an official one; SLA on a file without it is an
error. At least one key block is kept, where very short videos gave NaN. A frame count that is not 4k+1 is refused
(there text-to-video makes fewer frames than asked for), and so is a sigma_max below the second time of the grid
(14.1). Pictures stand upright by their EXIF rotation. Colours are converted and tagged as BT.709; there as BT.601,
without a tag. Errors are one line and exit code 2. Without a CUDA device all runs on the CPU in float32 with the
CPU's noise, and says so. There is no `--serve`.
"""
