"""Numbers of 8 and 4 bits for the weights of linear layers, after training (arXiv 2407.03211, section 3): the
schemes, and the two ways to choose the integers. Pure functions on tensors.

    scheme      weights (N out, K in), symmetric, no zero point        activations
    w8          int8, one scale for each output                        as they are
    w8a8        int8, one scale for each output                        int8, one scale for each token
    llm-int8    int8, one scale for each output                        the same, without outliers (2208.07339)
    w4          int4, one scale for each output                        as they are
    w4-g32/64/128   int4, one scale for each output and g inputs       as they are
    nf4         16 quantiles of a normal distribution (2305.14314),    as they are
                one absolute maximum for each 64 inputs

What a folder holds (quantized.py reads and writes it; N, K as above, G groups):

    w8 w4 w4-g*  compressed-tensors, format pack-quantized     weight_packed int32 (N, ceil(K bits / 32)),
                                                               weight_scale (N, G), weight_shape int64 (2)
    w8a8         compressed-tensors, format int-quantized      weight int8 (N, K), weight_scale (N, 1)
    llm-int8     bitsandbytes, load_in_8bit                    weight int8 (N, K), SCB fp32 (N), the absolute
                                                               maximum of each row, weight_format u8 ()
    nf4          bitsandbytes, load_in_4bit                    weight uint8 (N K / 2, 1), weight.absmax fp32
                                                               (N K / 64), weight.quant_map fp32 (16),
                                                               weight.quant_state.bitsandbytes__nf4 u8 (JSON)

compressed-tensors has no NF4 and no outlier columns, so those two are written as bitsandbytes writes them:
every folder is in a layout that transformers loads. config.json's `quantization_config` says which.

The scale of integers is the absolute maximum / 127 or 7, so that weights on such a grid are kept exactly.
(compressed-tensors' own observers divide by 127.5 and 7.5, which clips the largest weight by half a step.)
"""
