//! Every key of a config: its name, its unit and what it means. Suggestions for unknown keys, `polystage config` and
//! docs/config.md have them from here. What a key is where it is left out, the structs in `mod.rs` say.

use toml::Value;

use super::{AdapterConfig, Config};
use crate::error::{Error, Result, nearest};

/// A table of the file.
pub struct Table {
    /// As in `[train]`.
    pub name: &'static str,
    /// What it is about: one line.
    pub about: &'static str,
    /// Its keys, in the order in which they are shown.
    pub keys: &'static [Key],
}

/// A key of a table.
pub struct Key {
    /// As in the file.
    pub name: &'static str,
    /// What its number counts; empty for what is no number or has no unit.
    pub unit: &'static str,
    /// What it means: one line.
    pub about: &'static str,
    /// Whether a file may leave it out.
    pub absent: Absent,
}

/// What follows where a file leaves a key out.
#[derive(Clone, Copy)]
pub enum Absent {
    /// An error: a file must have it, for example with this value in TOML.
    Refused(&'static str),
    /// The default of its struct: [`defaults`] has it.
    Default,
    /// What no value says: these words do.
    Otherwise {
        /// What it is then.
        words: &'static str,
        /// A value in TOML that it could have.
        example: &'static str,
    },
}

use Absent::{Default, Refused};

const fn or(words: &'static str, example: &'static str) -> Absent {
    Absent::Otherwise { words, example }
}

const fn key(name: &'static str, unit: &'static str, absent: Absent, about: &'static str) -> Key {
    Key { name, unit, about, absent }
}

/// Every table.
pub const TABLES: &[Table] = &[
    Table {
        name: "model",
        about: "What is trained. With path the folder says the rest, and the other keys may be left out.",
        keys: &[
            key(
                "path",
                "",
                or("initial weights from train.seed", "\"runs/tiny-1\""),
                "Model folder, run or checkpoint whose weights the run begins with.",
            ),
            key(
                "kind",
                "",
                Refused("\"llama\""),
                "Family: gpt2, llama, qwen2, qwen3, mistral, or mlp (gpt2 without attention).",
            ),
            key("layers", "", Refused("4"), "Transformer blocks."),
            key("width", "elements", Refused("128"), "Length of the vector that a token is between layers."),
            key("heads", "", Refused("4"), "Attention heads; they divide width unless head_dim is given."),
            key("context", "tokens", Refused("128"), "Longest sequence that the model can see."),
            key("vocabulary", "tokens", Refused("256"), "Different tokens; 256 for bytes."),
            key(
                "kv_heads",
                "",
                or("as heads", "2"),
                "Heads of keys and values; they divide heads. Not gpt2.",
            ),
            key(
                "head_dim",
                "elements",
                or("width / heads", "32"),
                "Length of the vector of a head; even. Not gpt2.",
            ),
            key(
                "intermediate",
                "elements",
                or("gpt2: 4 width; others: 8/3 width, rounded up to a multiple of 64", "384"),
                "Width inside the feed-forward half of a block.",
            ),
            key(
                "norm_epsilon",
                "",
                or("gpt2: 1e-5; others: 1e-6", "1e-6"),
                "What is added to the variance in norms.",
            ),
            key(
                "tied_head",
                "",
                or("gpt2: true; others: false", "true"),
                "Whether the head's weight is the embedding's table.",
            ),
            key("initializer_range", "", or("0.02", "0.02"), "Standard deviation of the initial weights."),
            key(
                "sliding_window",
                "tokens",
                or("no window", "128"),
                "Tokens that a query sees. No longer sequence is computed. Not gpt2.",
            ),
            key("rope_theta", "", or("10000", "10000.0"), "Base of the rotary frequencies. Not gpt2."),
            key(
                "rope_scaling",
                "",
                or("no scaling", "{ rope_type = \"linear\", factor = 2.0 }"),
                "How the rotary frequencies were changed for a longer context: linear or llama3. Not gpt2.",
            ),
        ],
    },
    Table {
        name: "adapter",
        about: "With this table, empty or not, a LoRA adapter is trained and the model stays as it is.",
        keys: &[
            key("rank", "", Default, "Columns of B and rows of A."),
            key("alpha", "", Default, "The product of B and A is scaled by alpha / rank."),
            key("rank_stabilised", "", Default, "Scale by alpha over the root of rank instead."),
            key(
                "targets",
                "",
                or("queries and values, as PEFT", "[\"q_proj\", \"v_proj\"]"),
                "Linear layers: ends of their names, \"all-linear\", or a regular expression.",
            ),
        ],
    },
    Table {
        name: "data",
        about: "The text. Paths count from the config's folder, then from the working directory.",
        keys: &[
            key(
                "train",
                "",
                Refused("[\"text.txt\"]"),
                "Files or globs: text, records (.jsonl) or llm.c's tokens (.bin).",
            ),
            key("valid", "", Default, "The same, for evaluation."),
            key(
                "split",
                "fraction",
                Default,
                "The last part of the text is for evaluation, not for training; 0 for none.",
            ),
            key(
                "tokenizer",
                "",
                or("that of model.path, else \"bytes\"", "\"bytes\""),
                "\"bytes\", a tokenizer.json, or the folder it is in.",
            ),
            key(
                "bad_lines",
                "",
                Default,
                "A line that is no record ends the run (refuse) or is counted and left out (skip).",
            ),
            key(
                "keys",
                "",
                or("the usual names", "{ prompt = \"question\", completion = \"answer\" }"),
                "Fields of records that have other names; usual: text; prompt, completion; messages, role, content; ...",
            ),
            key(
                "order",
                "",
                Default,
                "Sequences in a seeded permutation an epoch (shuffled) or as they come (sequential).",
            ),
        ],
    },
    Table {
        name: "train",
        about: "Optimisation: AdamW. A step sees batch sequences of sequence tokens.",
        keys: &[
            key("steps", "steps", Refused("400"), "Steps in all; with epochs it may be left out."),
            key(
                "epochs",
                "",
                or("as steps says", "3.0"),
                "How often each sequence is seen. With steps too, whichever ends first.",
            ),
            key("batch", "sequences", Refused("8"), "Sequences of a step."),
            key("sequence", "tokens", Refused("128"), "Tokens of a sequence; at most model.context."),
            key(
                "learning_rate",
                "",
                Default,
                "The highest one: reached after warmup, and then a cosine falls from it.",
            ),
            key(
                "minimum_learning_rate",
                "",
                or("a tenth of learning_rate", "1e-4"),
                "Where the cosine ends.",
            ),
            key(
                "warmup",
                "steps",
                or("10, or a tenth of steps if that is less", "10"),
                "Steps over which the learning rate rises.",
            ),
            key("weight_decay", "", Default, "Decay of matrices, times the learning rate, a step."),
            key("clip_norm", "", Default, "Largest norm of the whole gradient; 0 does not clip."),
            key("beta1", "", Default, "Decay of the first moment."),
            key("beta2", "", Default, "Decay of the second moment."),
            key("epsilon", "", Default, "What is added to the root of the second moment."),
            key("seed", "", Default, "Seed of the initial weights and of the order of the data."),
            key(
                "weights",
                "",
                Default,
                "Matrices on the devices: f32, bf16 (with f32 masters), bf16-only. Under an adapter: as in its model's files.",
            ),
            key(
                "compute",
                "",
                Default,
                "Operands of matrix products: f32, f16 (sums and the rest in f32), or a list with one for each device.",
            ),
            key(
                "logits",
                "MiB",
                Default,
                "Most logits at once; more are computed in parts of the vocabulary, twice. Not divided with mesh.tensor.",
            ),
            key(
                "evaluate_every",
                "steps",
                Default,
                "Steps between evaluations, where there is text for them; the last step always has one.",
            ),
            key(
                "patience",
                "evaluations",
                Default,
                "Stop after so many evaluations in a row that were no better than the best; 0 never stops.",
            ),
        ],
    },
    Table {
        name: "pipeline",
        about: "Devices and schedule. What is left out, the planner chooses: see `polystage plan`.",
        keys: &[
            key(
                "devices",
                "",
                Default,
                "\"auto\" (every GPU, else every software adapter), a number of devices, or a list of adapters.",
            ),
            key(
                "schedule",
                "",
                or("the planner's choice", "\"1f1b\""),
                "A name (see `polystage schedule --help`), \"auto\" for one made for these devices, or a file.",
            ),
            key(
                "microbatches",
                "microbatches",
                or("the planner's choice", "8"),
                "Microbatches of a step; they divide train.batch.",
            ),
            key(
                "cuts",
                "",
                or("the planner's choice", "[3]"),
                "Layers before each stage after the first; embedding: 1, block: 1, or 0.5 + 0.5.",
            ),
            key(
                "recompute",
                "",
                or("stages that would not fit otherwise", "true"),
                "Stages that compute activations again in the backward pass: true, false, or a list.",
            ),
            key(
                "replan",
                "",
                Default,
                "Cut again, between two steps, when steps keep taking more than a tenth longer or shorter than predicted.",
            ),
        ],
    },
    Table {
        name: "mesh",
        about: "Axes beside the pipeline's, along which the work is divided: see docs/axes.md.",
        keys: &[
            key(
                "data",
                "",
                Default,
                "Pipelines beside each other: \"auto\", a number, or the microbatches of each, such as [5, 3].",
            ),
            key(
                "tensor",
                "",
                or("a device has whole layers", "2"),
                "Devices that divide every layer: a number, the share of each, such as [5, 3], or \"auto\".",
            ),
            key(
                "sequence_parallel",
                "",
                Default,
                "Whether the devices of mesh.tensor divide norms and sums too, by token: each keeps its share of all activations.",
            ),
            key(
                "wire",
                "",
                Default,
                "As what tensors travel between devices: f32, or bf16, half of the bytes, rounded.",
            ),
            key(
                "zero",
                "",
                or("1, or with optimizer = \"auto\" what fits", "3"),
                "ZeRO's level: 1 to divide optimizer state, 2 gradients too, 3 weights too; \"auto\": what fits.",
            ),
            key(
                "sum",
                "",
                Default,
                "Order of adding gradients: share (by replica) or microbatch (the bits of one device).",
            ),
            key(
                "optimizer",
                "",
                Default,
                "Where AdamW's state is and weights are updated: device, host, or auto for what fits.",
            ),
        ],
    },
    Table {
        name: "output",
        about: "What a run writes: see docs/run.md.",
        keys: &[
            key(
                "checkpoint_every",
                "steps",
                Default,
                "Steps between checkpoints; the last step always has one; 0 for no others.",
            ),
            key("checkpoint_at_start", "", Default, "Write the initial weights too."),
            key(
                "keep",
                "checkpoints",
                Default,
                "How many of the newest are kept; that of the best evaluation stays besides.",
            ),
        ],
    },
];

/// Refuses a table or a key that is not known, and names the nearest one.
pub(super) fn check(file: &toml::Table, place: &str) -> Result<()> {
    for (section, value) in file {
        let Some(table) = TABLES.iter().find(|table| table.name == section) else {
            let near = nearest(section, TABLES.iter().map(|table| table.name));
            return Err(Error::config(place, format!("unknown table [{section}]; did you mean [{near}]?")));
        };
        let Some(inner) = value.as_table() else {
            return Err(Error::config(place, format!("{section} must be a table: write [{section}]")));
        };
        let names = || table.keys.iter().map(|key| key.name);
        if let Some(stranger) = inner.keys().find(|given| names().all(|name| name != *given)) {
            let near = nearest(stranger, names());
            let message = format!("unknown key {section}.{stranger}; did you mean {section}.{near}?");
            return Err(Error::config(place, message));
        }
    }
    Ok(())
}

/// The smallest config: every key that a file must have, with the value that [`TABLES`] gives for an example.
pub fn smallest() -> String {
    let mut text = String::new();
    for table in TABLES {
        for (n, (key, example)) in table.keys.iter().filter_map(Key::refused).enumerate() {
            let heading = if n == 0 { format!("[{}]\n", table.name) } else { String::new() };
            text += &format!("{heading}{} = {example}\n", key.name);
        }
    }
    text
}

/// The keys that have a default, table by table, with the values that a config has which leaves them out.
///
/// # Errors
/// None, unless [`TABLES`] and the structs contradict each other.
pub fn defaults() -> Result<toml::Table> {
    let mut all = Config::parse(&smallest(), &[], "the smallest config")?.to_table();
    let adapter = toml::Table::try_from(AdapterConfig::default()).unwrap_or_default();
    all.insert("adapter".into(), Value::Table(adapter));
    for table in TABLES {
        let Some(values) = all.get_mut(table.name).and_then(Value::as_table_mut) else { continue };
        table.keys.iter().filter_map(Key::refused).for_each(|(key, _)| drop(values.remove(key.name)));
    }
    Ok(all)
}

impl Key {
    /// The key and its example, if a file must have it.
    fn refused(&self) -> Option<(&Key, &'static str)> {
        match self.absent {
            Refused(example) => Some((self, example)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde::de::DeserializeOwned;

    use super::*;
    use crate::model::ModelConfig;
    use crate::train::config::{DataConfig, OutputConfig, PipelineConfig, TrainConfig};

    /// The names that a struct reads, which serde lists when it meets another.
    fn read_by<T: DeserializeOwned>() -> BTreeSet<String> {
        let error =
            toml::from_str::<T>("'no such key' = 0").err().expect("strangers are refused").to_string();
        let list = error.split("expected").nth(1).expect("names what is known");
        list.split('`').skip(1).step_by(2).map(String::from).collect()
    }

    #[test]
    fn the_tables_name_what_the_structs_read_and_nothing_else() {
        let structs = [
            ("model", read_by::<ModelConfig>()),
            ("adapter", read_by::<AdapterConfig>()),
            ("data", read_by::<DataConfig>()),
            ("train", read_by::<TrainConfig>()),
            ("pipeline", read_by::<PipelineConfig>()),
            ("output", read_by::<OutputConfig>()),
        ];
        let tables: BTreeSet<String> = TABLES.iter().map(|table| table.name.to_string()).collect();
        assert_eq!(tables, read_by::<Config>());
        for (name, mut read) in structs {
            if name == "model" {
                // Taken out before the struct is read.
                read.insert("path".into());
            }
            let table = TABLES.iter().find(|table| table.name == name).unwrap();
            let listed: BTreeSet<String> = table.keys.iter().map(|key| key.name.to_string()).collect();
            assert_eq!(listed, read, "[{name}]");
            assert_eq!(listed.len(), table.keys.len(), "[{name}] names a key twice");
        }
    }

    #[test]
    fn what_happens_to_a_key_that_is_left_out_is_what_the_tables_say() {
        let defaults = defaults().unwrap();
        let smallest: toml::Table = smallest().parse().unwrap();
        for table in TABLES {
            for key in table.keys {
                let default = defaults[table.name].get(key.name);
                let mut without = smallest.clone();
                let section = without.entry(table.name).or_insert_with(|| Value::Table(toml::Table::new()));
                section.as_table_mut().unwrap().remove(key.name);
                let without = toml::to_string(&without).unwrap();
                let refused = Config::parse(&without, &[], "test").is_err();
                let said = (default.is_some(), refused);
                let expected = match key.absent {
                    Absent::Refused(_) => (false, true),
                    Absent::Default => (true, false),
                    Absent::Otherwise { .. } => (false, false),
                };
                assert_eq!(said, expected, "{}.{}", table.name, key.name);
            }
        }
    }

    #[test]
    fn what_is_said_of_a_key_is_one_line_of_bearable_length() {
        for table in TABLES {
            for about in table.keys.iter().map(|key| key.about).chain([table.about]) {
                assert!(
                    about.ends_with('.') && !about.contains(['\n', '|']) && about.len() <= 118,
                    "{about}"
                );
            }
        }
    }
}
