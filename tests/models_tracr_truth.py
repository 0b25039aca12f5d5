"""Residual streams of the bundled tracr programs, recorded once from tracr itself (tracr-pypi 1.0.0, jax).

The programs were compiled anew, their parameters found equal to the bundled files bit for bit, and run. `steps` holds,
for every attention and MLP sublayer in turn and every position, what the sublayer adds to the residual stream, by
residual label; 1 is left out after a label, and a label that is not named gets 0 (differences below 2e-7 too).
"""

TRUTH: dict[str, dict] = {
    "tracr-hist": {
        "text": "a b a c",
        "answer": "2 1 2 1",
        "embedding": [
            "one tokens:bos",
            "indices:0 one tokens:a",
            "indices:1 one tokens:b",
            "indices:2 one tokens:a",
            "indices:3 one tokens:c",
        ],
        "steps": [
            [
                "hist_7_selector_width_attn_output",
                "hist_7_selector_width_attn_output=0.33333334",
                "hist_7_selector_width_attn_output=0.5",
                "hist_7_selector_width_attn_output=0.33333334",
                "hist_7_selector_width_attn_output=0.5",
            ],
            [
                "hist_7_selector_width_attn_output=-1",
                "hist_7:2",
                "hist_7:1 hist_7:4=-1.9073486e-06 hist_7:5=1.9073486e-06",
                "hist_7:2",
                "hist_7:1 hist_7:4=-1.9073486e-06 hist_7:5=1.9073486e-06",
            ],
        ],
    },
    "tracr-reverse": {
        "text": "c c a b a",
        "answer": "a b a c c",
        "embedding": [
            "one tokens:bos",
            "indices:0 one tokens:c",
            "indices:1 one tokens:c",
            "indices:2 one tokens:a",
            "indices:3 one tokens:b",
            "indices:4 one tokens:a",
        ],
        "steps": [
            [
                "length_5_selector_width_attn_output",
                "length_5_selector_width_attn_output=0.16666667",
                "length_5_selector_width_attn_output=0.16666667",
                "length_5_selector_width_attn_output=0.16666667",
                "length_5_selector_width_attn_output=0.16666667",
                "length_5_selector_width_attn_output=0.16666667",
            ],
            [
                "length_5_selector_width_attn_output=-1",
                "length_5:5",
                "length_5:5",
                "length_5:5",
                "length_5:5",
                "length_5:5",
            ],
            [""] * 6,
            [
                "",
                "sequence_map_4:5",
                "sequence_map_4:4",
                "sequence_map_4:3",
                "sequence_map_4:2",
                "sequence_map_4:1",
            ],
            [""] * 6,
            [
                "",
                "map_3:4",
                "map_3:3",
                "map_3:2",
                "map_3:1",
                "map_3:0",
            ],
            [
                "aggregate_1:a=1.0777742e-06 aggregate_1:b=5.3888709e-07 aggregate_1:c=1.0777742e-06",
                "aggregate_1:a=0.9999994",
                "aggregate_1:b=0.9999994",
                "aggregate_1:a=0.9999994",
                "aggregate_1:c=0.9999994",
                "aggregate_1:c=0.9999994",
            ],
            [""] * 6,
        ],
    },
    "tracr-sort": {
        "text": "2 2 1 4 1",
        "answer": "1 1 2 2 4",
        "embedding": [
            "one tokens:bos",
            "indices:0 one tokens:2",
            "indices:1 one tokens:2",
            "indices:2 one tokens:1",
            "indices:3 one tokens:4",
            "indices:4 one tokens:1",
        ],
        "steps": [
            [""] * 6,
            [
                "",
                "sequence_map_13:2.0",
                "sequence_map_13:2.2",
                "sequence_map_13:1.4",
                "sequence_map_13:4.6",
                "sequence_map_13:1.8",
            ],
            [
                "target_pos_11_selector_width_attn_output",
                "target_pos_11_selector_width_attn_output=0.33333334",
                "target_pos_11_selector_width_attn_output=0.25",
                "target_pos_11_selector_width_attn_output",
                "target_pos_11_selector_width_attn_output=0.2",
                "target_pos_11_selector_width_attn_output=0.5",
            ],
            [
                "target_pos_11_selector_width_attn_output=-1",
                "target_pos_11:2",
                "target_pos_11:3",
                "target_pos_11:0",
                "target_pos_11:4",
                "target_pos_11:1 target_pos_11:4=-1.9073486e-06 target_pos_11:5=1.9073486e-06",
            ],
            [
                "sort_9:1=4.6922822e-05 sort_9:2=4.6922822e-05 sort_9:4=2.3461411e-05",
                "sort_9:1=0.99997652",
                "sort_9:1=0.99997652",
                "sort_9:2=0.99997652",
                "sort_9:2=0.99997652",
                "sort_9:4=0.99997652",
            ],
            [""] * 6,
        ],
    },
}
