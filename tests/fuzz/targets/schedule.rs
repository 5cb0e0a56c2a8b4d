//! Schedules written by hand, and machines.

use std::sync::LazyLock;

use polystage::plan::Machine;
use polystage::schedule::{Costs, Schedule, grid, simulate};
use polystage::train::config::Config;
use polystage::train::planning::Planning;

use super::{Target, outcome};

/// The text form.
pub static SCHEDULE: Target = Target {
    name: "schedule",
    words: r#"0F0 0B0 1F0 1B1 2I0 2W0 0SEND_F0 1RECV_F0 1SEND_B0 0RECV_B0 . , # 4096F4096 1048576B0"#,
    seeds: |_| {
        let texts =
            include_str!("../../golden/schedules/texts.txt").split("\n\n").map(|text| format!("{text}\n"));
        let lowered = [
            include_str!("../../golden/schedules/1f1b_lowered.txt"),
            include_str!("../../golden/schedules/zb-v_lowered.txt"),
            "# mine\n\n0F0 0F1 .  0B0 0B1 # first\r\n1F0,1B0,1F1,1B1,,\n",
        ];
        texts.chain(lowered.map(String::from)).map(String::into_bytes).collect()
    },
    run: |_, input| {
        let Ok(text) = std::str::from_utf8(input) else { return "not text".into() };
        outcome(text.parse::<Schedule>().and_then(|schedule| {
            // Drawn whether it can run or not.
            let drawn = grid(&schedule);
            schedule.validate()?;
            let lowered = schedule.lowered()?;
            lowered.validate()?;
            let simulation = simulate(&lowered, &Costs::uniform(&lowered, 1.0, 1.0, 1.0, 0.5))?;
            for stage in 0..schedule.stages.min(100) {
                assert_eq!(
                    schedule.slots(stage, schedule.rank_of(stage).unwrap()).slot.len(),
                    schedule.microbatches
                );
                schedule.gradient_slots(stage, 0);
            }
            assert_eq!(lowered.to_string().parse::<Schedule>()?.ranks, lowered.ranks);
            Ok(format!("{} {} {}", drawn.len().ilog2(), simulation.cells.len().ilog2(), lowered.ranks.len()))
        }))
    },
};

/// A machine file, and a plan for the machine.
pub static MACHINE: Target = Target {
    name: "machine",
    words: r#"
        [[devices]] [devices.rates] [link] [[links]] [[devices.shapes]] [devices.shapes.layers.block] name
        driver memory max_binding cores copy_engine jitter matmul_gflops memory_gb_s launch_us submit_us
        optimizer_gb_s norm_gb_s clear_gb_s barrier_us latency_us gb_s out_gb_s into_gb_s from to slowdown
        shape forward input weight backward "24GiB" "1KiB" "1e999GiB" true false = 1e-4 1e9 6e7 3600 1000"#,
    seeds: |_| {
        vec![
            include_bytes!("../../../configs/machines/laptop.toml").to_vec(),
            include_bytes!("../../../configs/machines/three-vendors.toml").to_vec(),
            FULL.as_bytes().to_vec(),
        ]
    },
    run: |_, input| {
        let Ok(text) = std::str::from_utf8(input) else { return "not text".into() };
        static CONFIG: LazyLock<Config> =
            LazyLock::new(|| Config::parse(TINY, &[], "tiny").expect("a config"));
        outcome(Machine::parse(text, "fuzz.toml").and_then(|machine| {
            assert_eq!(Machine::parse(&machine.to_toml(), "again")?, machine);
            let devices = machine.devices.len();
            let planned = Planning::for_machine(&CONFIG, machine, None)?.search()?;
            Ok(format!("{devices} {}", planned.best.devices.len()))
        }))
    },
};

/// Every key of a machine file.
const FULL: &str = r#"
name = "full"
cores = 2
slowdown = [[1, 1.5], [1.25, 1]]
[link]
latency_us = 10
gb_s = 1.0
out_gb_s = 2.0
into_gb_s = 2.0
[[links]]
from = 0
to = 1
latency_us = 5
gb_s = 3
[[devices]]
name = "a"
driver = "d"
memory = "1GiB"
max_binding = 1000000
cores = 1
copy_engine = true
jitter = { part = 0.1, seconds = 0.5 }
[devices.rates]
matmul_gflops = 100.0
memory_gb_s = 10.0
launch_us = 1
submit_us = 2
optimizer_gb_s = 3
norm_gb_s = 4
clear_gb_s = 5
barrier_us = 6
[[devices.shapes]]
shape = "x"
submit_us = 3
[devices.shapes.layers.block]
forward = 1e-3
input = 1e-3
weight = 1e-3
backward = 2e-3
[[devices]]
name = "b"
[devices.rates]
matmul_gflops = 50.0
memory_gb_s = 10.0
launch_us = 1
submit_us = 2
barrier_us = 6
"#;

/// What is planned.
const TINY: &str = "
[model]\nkind = 'gpt2'\nlayers = 2\nwidth = 16\nheads = 1\ncontext = 8\nvocabulary = 256
[data]\ntrain = ['x']
[train]\nsteps = 1\nbatch = 2\nsequence = 8";
