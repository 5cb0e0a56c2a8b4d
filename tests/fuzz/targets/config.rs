//! Experiments and the configurations of models.

use polystage::folder::adapter::Targets;
use polystage::model::{Model, ModelConfig, Weights};
use polystage::train::config::{AdapterConfig, Config, Described};

use super::{Target, outcome, pieces, whole};

/// A file, and then what `--set` says, once or several times.
pub static EXPERIMENT: Target = Target {
    name: "experiment",
    words: r#"
        [model] [adapter] [data] [train] [pipeline] [output] kind layers width heads context vocabulary
        kv_heads head_dim intermediate norm_epsilon tied_head initializer_range sliding_window rope_theta
        rope_scaling path rank alpha rank_stabilised targets train valid split tokenizer bad_lines keys order epochs
        steps batch sequence learning_rate minimum_learning_rate warmup clip_norm beta1 epsilon seed
        evaluate_every patience weights devices schedule microbatches cuts recompute replan checkpoint_every
        keep "llama" "gpt2" "qwen3" "mistral" "mlp" "all-linear" "auto" "bf16" "bytes" "zb-v" ''' """
        model.path="x" train.batch= = [ ] { } 2026-01-01T00:00:00Z "(?=a)*" "(a{1000}){1000}" "(.*)\\1""#,
    seeds: |_| {
        let adapter = concat!(
            "[adapter]\nrank = 4\nalpha = 8.0\nrank_stabilised = true\ntargets = [\"q_proj\", \"v_proj\"]\n",
            "[model]\nkind = \"llama\"\nlayers = 2\nwidth = 32\nheads = 4\nkv_heads = 2\nhead_dim = 8\ncontext = 64\n",
            "vocabulary = 256\nintermediate = 64\nnorm_epsilon = 1e-5\ntied_head = true\ninitializer_range = 0.02\n",
            "sliding_window = 64\nrope_theta = 1e4\nrope_scaling = { rope_type = \"linear\", factor = 2.0 }\n",
            "[data]\ntrain = [\"a*.txt\", 'b.jsonl']\nvalid = [\"c.bin\"]\ntokenizer = \"bytes\"\nbad_lines = \"skip\"\n",
            "order = \"sequential\"\n[train]\nsteps = 10\nbatch = 8\nsequence = 32\nweights = \"bf16\"\npatience = 2\n",
            "[pipeline]\ndevices = [0, 1]\nschedule = \"1f1b\"\nmicrobatches = 4\ncuts = [2]\nrecompute = [0]\n",
            "replan = true\n[output]\ncheckpoint_every = 5\ncheckpoint_at_start = true\nkeep = 2\n",
        );
        let tuned = "[model]\npath = \"there\"\n[data]\ntrain = [\"x\"]\n[train]\nsteps = 1\nbatch = 1\nsequence = 8\n";
        vec![
            whole(&[include_str!("../../../configs/tiny.toml"), "train.batch=16", "pipeline.devices=2"]),
            whole(&[include_str!("../../../configs/llama.toml")]),
            whole(&[include_str!("../../../configs/mixed-gpus.toml")]),
            whole(&[adapter]),
            whole(&[adapter, "train.steps=5", "pipeline.schedule=zb-v", "data.train=[\"y\"]"]),
            whole(&[tuned]),
        ]
    },
    run: |_, input| {
        let pieces = pieces(input);
        let Ok(text) = std::str::from_utf8(pieces[0]) else { return "not text".into() };
        let overrides = pieces[1..].iter().map(|text| String::from_utf8_lossy(text).into_owned());
        let overrides: Vec<String> = overrides.collect();
        outcome(Config::parse_with(text, &overrides, "fuzz.toml", |_| Ok(described())).map(|config| {
            // What a run writes down must be what it read.
            let written = config.to_toml();
            let again = Config::parse_with(&written, &[], "again", |_| Ok(described()))
                .expect("what was written is read");
            assert_eq!(again, config, "{written}");
            format!("{:?}", config.model.kind)
        }))
    },
};

/// What is in the folder that `model.path` names.
fn described() -> Described {
    let extents =
        ModelConfig { layers: 1, width: 8, heads: 1, context: 8, vocabulary: 256, ..ModelConfig::default() };
    let targets = Some(Targets::Names(vec!["c_attn".into()]));
    let adapter = AdapterConfig { rank: 2, alpha: 4.0, rank_stabilised: false, targets };
    Described { model: extents, adapter: Some(adapter), weights: Weights::F32 }
}

/// Hugging Face's config.json.
pub static MODEL: Target = Target {
    name: "model-config",
    words: r#"
        "model_type" "gpt2" "llama" "mistral" "qwen2" "qwen3" "polystage-mlp" "n_layer" "n_embd" "n_head"
        "n_positions" "vocab_size" "n_inner" "num_hidden_layers" "hidden_size" "num_attention_heads"
        "num_key_value_heads" "head_dim" "max_position_embeddings" "intermediate_size" "rope_scaling"
        "rope_parameters" "rope_theta" "rope_type" "llama3" "linear" "factor" "low_freq_factor"
        "high_freq_factor" "original_max_position_embeddings" "sliding_window" "layer_types"
        "use_sliding_window" "max_window_layers" "quantization_config" "architectures" "tie_word_embeddings"
        "rms_norm_eps" null true false { } [ ] : ,"#,
    seeds: |_| {
        let scaled = r#"{"model_type":"llama","vocab_size":64,"max_position_embeddings":64,"hidden_size":16,
            "intermediate_size":32,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,
            "rms_norm_eps":1e-5,"rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,
            "high_freq_factor":4.0,"original_max_position_embeddings":32},"tie_word_embeddings":true}"#;
        vec![
            include_bytes!("../../golden/models/gpt2/config.json").to_vec(),
            include_bytes!("../../golden/models/llama/config.json").to_vec(),
            include_bytes!("../../golden/models/mistral/config.json").to_vec(),
            include_bytes!("../../golden/models/qwen2/config.json").to_vec(),
            include_bytes!("../../golden/models/qwen3/config.json").to_vec(),
            scaled.as_bytes().to_vec(),
        ]
    },
    run: |_, input| {
        let Ok(json) = serde_json::from_slice(input) else { return "not JSON".into() };
        outcome(Model::from_hugging_face(&json).map(|model| {
            let again =
                Model::from_hugging_face(&model.hugging_face_config()).expect("what was written is read");
            assert_eq!(again.config(), model.config());
            let (count, linear) = (model.parameter_count(), model.linear_layers().len());
            if model.layers() < 8 {
                model.layer_flops(1, model.config().longest_sequence().min(8)).expect("shapes fit");
            }
            format!("{:?} {count} {linear}", model.config().kind)
        }))
    },
};
