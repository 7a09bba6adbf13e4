"""The token mixers that keep a recurrent state: what a layer computes in place of attention."""

from __future__ import annotations

from llmkit.model.gated_delta_net_mixer import gated_delta_net
from llmkit.model.mamba2_mixer import mamba2
from llmkit.model.mixer_layer import RecurrentMixer
from llmkit.model.short_conv_mixer import short_conv
from llmkit.model.spec import Mixer

RECURRENT_MIXERS: dict[Mixer, RecurrentMixer] = {
    "gated_delta_net": gated_delta_net,
    "mamba2": mamba2,
    "short_conv": short_conv,
}
