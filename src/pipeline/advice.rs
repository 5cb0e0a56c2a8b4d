//! What would make a pipeline fit that does not: changes that its user can make, each tried before it is named.

use std::iter::successors;

use super::{Plan, Setup, Use};
use crate::error::Error;
use crate::gpu::{AdapterInfo, Capabilities};
use crate::graph::FEW_LOGIT_BYTES;
use crate::model::Weights;
use crate::plan::{Optimizer, Sharding};
use crate::schedule;

/// Tokens below which a shorter sequence or text is no help.
const SHORTEST: usize = 16;

type Adapters = [(AdapterInfo, Capabilities)];

/// The error with what helps, if it is about memory or a binding.
pub(super) fn with_help(error: Error, setup: &Setup, adapters: &Adapters) -> Error {
    match error {
        Error::Memory { device, adapter, need, budget, .. } => {
            let mut help = help(setup, adapters);
            help.extend(more_memory(setup, adapters));
            Error::Memory { device, adapter, need, budget, help: Some(help) }
        }
        Error::Binding { tensor, adapter, need, limit, .. } => {
            Error::Binding { tensor, adapter, need, limit, help: Some(help(setup, adapters)) }
        }
        other => other,
    }
}

/// The changes with which it fits, in words that follow `it would fit with`.
fn help(setup: &Setup, adapters: &Adapters) -> Vec<String> {
    let fits = |(changed, _): &(Setup, String)| Plan::cut(changed, adapters).is_ok();
    let mut found = Vec::new();
    let mut first = |mut ways: &mut dyn Iterator<Item = (Setup, String)>| {
        found.extend(Iterator::find(&mut ways, fits).map(|(_, words)| words));
    };
    let training = setup.purpose.trains();
    let set = |key: &str, value: String| match training {
        true => format!("--set train.{key}={value}"),
        false => format!("--{key} {value}"),
    };
    if training {
        let now = setup.sharding;
        let (level, words) = match now.by_host() {
            true => (3, "--set mesh.zero=3"),
            false => (now.zero, "--set mesh.optimizer=host"),
        };
        let host = Sharding::new(level, now.sum, Optimizer::Host).ok().filter(|sharding| *sharding != now);
        let host = host.into_iter().map(|sharding| (Setup { sharding, ..setup.clone() }, words.to_string()));
        first(&mut { host });
    }
    let stored = [Weights::BF16, Weights::BF16Only].into_iter().filter(|&w| training || w == Weights::BF16);
    first(
        &mut stored
            .map(|weights| (Setup { weights, ..setup.clone() }, set("weights", weights.name().into()))),
    );
    let halves = |from: usize, least: usize| {
        successors(Some(from / 2), |n| Some(n / 2)).take_while(move |&n| n >= least)
    };
    match setup.purpose {
        Use::Training | Use::Evaluation | Use::Logits => {
            let shorter = halves(setup.sequence, SHORTEST);
            first(&mut shorter.map(|sequence| {
                (Setup { sequence, ..setup.clone() }, set("sequence", sequence.to_string()))
            }));
        }
        Use::Decoding { capacity } => {
            let shorter = halves(capacity, SHORTEST).map(|capacity| {
                let (purpose, sequence) = (Use::Decoding { capacity }, setup.sequence.min(capacity));
                let words = format!("at most {capacity} tokens, prompt and answer together");
                (Setup { purpose, sequence, ..setup.clone() }, words)
            });
            first(&mut { shorter });
            let groups = setup.schedule.microbatches;
            first(&mut halves(setup.batch, 1).map(|batch| {
                (Setup { batch, ..setup.clone() }, format!("at most {} texts at a time", batch * groups))
            }));
        }
    }
    let again = |ranks: usize, microbatches: usize| {
        schedule::generate(&setup.schedule.name, ranks, microbatches).ok()
    };
    let (ranks, microbatches) = (setup.schedule.ranks.len(), setup.schedule.microbatches);
    if training {
        let counts = (microbatches + 1..=setup.batch * microbatches)
            .filter(|count| (setup.batch * microbatches).is_multiple_of(*count));
        let smaller = counts.filter_map(|count| {
            let batch = setup.batch * microbatches / count;
            let changed = Setup { batch, schedule: again(ranks, count)?, ..setup.clone() };
            Some((changed, format!("--set pipeline.microbatches={count}")))
        });
        first(&mut { smaller });
        let recompute = (0..setup.schedule.stages).collect();
        let changed = Setup { recompute, ..setup.clone() };
        first(&mut [(changed, "--set pipeline.recompute=true".to_string())].into_iter());
        let changed = Setup { logits: setup.logits.min(FEW_LOGIT_BYTES), ..setup.clone() };
        first(&mut [(changed, format!("--set train.logits={}", FEW_LOGIT_BYTES >> 20))].into_iter());
        if setup.cuts.is_some() {
            let changed = Setup { cuts: None, ..setup.clone() };
            first(&mut [(changed, "pipeline.cuts left out".to_string())].into_iter());
        }
    }
    found.extend(another_device(setup, adapters, again(ranks + 1, microbatches)));
    found
}

/// One more device like one of those that are there.
fn another_device(
    setup: &Setup,
    adapters: &Adapters,
    schedule: Option<schedule::Schedule>,
) -> Option<String> {
    let schedule = schedule.filter(|_| setup.cuts.is_none() && setup.budgets.len() == adapters.len())?;
    let mut changed = Setup { schedule, ..setup.clone() };
    (0..adapters.len()).find_map(|device| {
        changed.budgets.truncate(adapters.len());
        changed.budgets.push(setup.budgets[device]);
        let more = [adapters, &adapters[device..device + 1]].concat();
        let name = &adapters[device].0.name;
        Plan::cut(&changed, &more).ok().map(|_| format!("one more device like {device} ({name})"))
    })
}

/// Larger budgets, where the adapters have that much.
fn more_memory(setup: &Setup, adapters: &Adapters) -> Option<String> {
    let has = |adapter: &AdapterInfo| {
        let same = adapters.iter().filter(|(other, _)| other.index == adapter.index).count() as u64;
        adapter.memory.map(|memory| memory / same)
    };
    let all = adapters.iter().map(|(adapter, _)| has(adapter)).collect();
    let plan = Plan::cut(&Setup { budgets: all, ..setup.clone() }, adapters).ok()?;
    let mut changed = setup.clone();
    let mut parts = Vec::new();
    for (at, (rank, budget)) in plan.ranks.iter().zip(&mut changed.budgets).enumerate() {
        let needed = rank.bytes + rank.passing;
        if budget.is_some_and(|budget| budget < needed) {
            let rounded = needed.div_ceil(1 << 20);
            *budget = Some(rounded << 20);
            parts.push(format!("{at}={rounded}MiB"));
        }
    }
    Plan::cut(&changed, adapters).ok().map(|_| format!("--memory {}", parts.join(",")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::imagined;
    use crate::graph::LOGIT_BYTES;
    use crate::mesh::{Division, Wire};
    use crate::plan::Sharding;

    /// A card of so many bytes that binds so many at once.
    fn card(index: usize, memory: Option<u64>, max_binding: u64) -> (AdapterInfo, Capabilities) {
        let (info, capabilities) = imagined(index, "card", Some(max_binding));
        (AdapterInfo { memory, ..info }, capabilities)
    }

    fn setup(purpose: Use, name: &str, budget: Option<u64>) -> Setup {
        let model = "kind = 'gpt2'\nlayers = 4\nwidth = 128\nheads = 2\ncontext = 512\nvocabulary = 256";
        Setup {
            model: toml::from_str(model).unwrap(),
            adapter: None,
            weights: Weights::F32,
            logits: LOGIT_BYTES,
            batch: 4,
            sequence: 512,
            schedule: schedule::generate(name, 1, 1).unwrap(),
            cuts: None,
            shared: false,
            recompute: Vec::new(),
            sharding: Sharding::default(),
            tensor: Division::none(),
            wire: Wire::F32,
            host: None,
            purpose,
            budgets: vec![budget],
        }
    }

    /// What is said where the budget is this part of what is needed.
    fn says(purpose: Use, name: &str, memory: Option<u64>, part: f64) -> String {
        let adapters = [card(0, memory, u64::MAX)];
        let whole = Plan::cut(&setup(purpose, name, None), &adapters).unwrap().ranks[0].bytes;
        let setup = setup(purpose, name, Some((part * whole as f64) as u64));
        let error = Plan::cut(&setup, &adapters).err().unwrap();
        with_help(error, &setup, &adapters).to_string()
    }

    #[test]
    fn advice_is_what_the_verb_has() {
        let training = says(Use::Training, "1f1b", None, 0.7);
        for words in
            ["--set train.sequence=", "--set pipeline.microbatches=", "one more device", "--memory 0="]
        {
            assert!(training.contains(words), "{words}: {training}");
        }
        let evaluation = says(Use::Evaluation, "gpipe", None, 0.7);
        assert!(evaluation.contains("--sequence 256"), "{evaluation}");
        let decoding = says(Use::Decoding { capacity: 512 }, "gpipe", None, 0.8);
        assert!(decoding.contains("tokens, prompt and answer together"), "{decoding}");
        assert!(decoding.contains("texts at a time"), "{decoding}");
        for said in [evaluation, decoding] {
            assert!(!said.contains("microbatches") && !said.contains("recompute"), "{said}");
            assert!(!said.contains("train."), "{said}");
        }
    }

    #[test]
    fn fewer_logits_at_once_are_advised_where_they_are_what_does_not_fit() {
        let adapters = [card(0, None, u64::MAX)];
        let mut setup = setup(Use::Training, "1f1b", None);
        setup.model.vocabulary = 70_000;
        let whole = Plan::cut(&setup, &adapters).unwrap().ranks[0].bytes;
        // Of 573 MB of logits 134 are left.
        setup.budgets = vec![Some(whole - (400 << 20))];
        let error = Plan::cut(&setup, &adapters).err().unwrap();
        let said = with_help(error, &setup, &adapters).to_string();
        assert!(said.contains("--set train.logits=128"), "{said}");
    }

    #[test]
    fn no_more_memory_is_asked_for_than_there_is() {
        assert!(says(Use::Evaluation, "gpipe", Some(1 << 40), 0.7).contains("--memory 0="));
        assert!(!says(Use::Evaluation, "gpipe", Some(1 << 20), 0.7).contains("--memory"));
    }

    #[test]
    fn a_weight_that_cannot_be_bound_does_not_depend_on_the_sequence() {
        let adapters = [card(0, None, 100 << 10)];
        let mut setup = setup(Use::Evaluation, "gpipe", None);
        (setup.batch, setup.sequence) = (1, 16);
        let error = Plan::cut(&setup, &adapters).err().unwrap();
        let said = with_help(error, &setup, &adapters).to_string();
        assert!(said.contains("binds at most 102400 at once"), "{said}");
        assert!(!said.contains("sequence") && !said.contains("--memory"), "{said}");
    }
}
