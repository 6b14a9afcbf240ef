"""The engine: computes a training step over tiles of the batch's edges, with fused stages between matrix products.

Nothing of size n² · D is held unless `edge_memory` says so. To learn how it works, read these files in this order:

    schedule        cuts the pairs of a batch into tiles, and shows node tensors to a tile
    stages/gate     one stage whole: its arguments, plain torch forward and backward, and the fused ops;
                    every other file in stages/ has the same form
    graph           sweeps over all tiles, layer by layer, forward and then backward
    prepare         what comes before a pass: memory mode, schedule and stages of a batch
    metric_pass     phase 1 of a training step, as an operator: losses that train the embedding
    generator_pass  phase 3, as a function for autograd: losses that train the generator
    engine          what GCAHNGLoss calls

A call goes the other way: GCAHNGLoss → engine → metric_pass or generator_pass → graph → nodes and stages.

Each of the other files has one task.

    operands, schema             arguments by name, and how NamedTuples become a torch op's flat arguments
    nodes, weights, masks        node tensors by autograd; prepared parameters; dropout masks
    stages/common, stages/edge_update   what stages share; gate, mlp_in and mlp_out together
    synthetic, base_pass         J_syn over tiles; phase 1 where the base loss makes it
    edge_update, channel_mix     the operators behind gcahng.ops
    coefficients                 θ of a whole batch, for GCAHNGLoss.generate
    precision, differentiable_once      dtype of products; the error for a second derivative
    workspace, free_memory, step_size, plan   memory: reused buffers, what is free, and what a step will take
    cuda_graph, ranks            captured passes; a batch that several processes share

Nothing here knows which implementation is best: gcahng.dispatch decides that.
"""
