//! What there is to choose from, once everything that was fixed by hand has been checked.

use super::costs::Prices;
use super::form::{Form, MOST_CHUNKS, forms};
use super::machine::{DeviceProfile, Machine};
use super::workload::Workload;
use super::{Options, RecomputeChoice, ScheduleChoice};
use crate::error::{Error, Result};
use crate::layers::Layers;
use crate::schedule::{AUTO, Schedule};

/// More sets of devices than this are not looked at: the slowest devices are left out first.
const MOST_SETS: usize = 1 << 10;
/// Of more layers than these it is sought between blocks alone where to cut.
const MOST_HALVES: usize = 14;
/// A model of more layers is cut only between so many groups of them, or fewer where there are many sets of devices.
const MOST_PARTS: usize = 160;
/// Cells (stages × microbatches) of all forms together: they are kept, and each takes about two kilobytes. Divisions into
/// more microbatches are left out.
const MOST_CELLS: usize = 1 << 18;
/// Ranges of layers, for every set of devices and class, that are looked at when the search starts.
const MOST_RANGES: usize = 40_000_000;

/// The plans that may be chosen.
#[derive(Debug)]
pub(super) struct Space<'a> {
    /// Of each batching that is tried.
    pub prices: Vec<Prices<'a>>,
    /// Its position in [`Workload::batchings`].
    pub batchings: Vec<usize>,
    /// Schedules, by number of ranks and batching.
    pub forms: Vec<Form>,
    pub pool: Pool,
    /// Where the model may be cut, from 0 to its number of layers.
    pub marks: Vec<usize>,
    /// Whether it must be cut at every mark.
    pub is_cut: bool,
    pub recompute: RecomputeChoice,
    /// Whether the schedules of the forms are wanted themselves.
    pub named: bool,
    /// Whether schedules are to be synthesised.
    pub auto: bool,
}

/// Devices by class: those of one class can be exchanged without changing anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pool {
    /// Devices of each class.
    pub classes: Vec<Vec<usize>>,
    /// The devices of all ranks in order, if they are fixed; each is then a class of its own.
    pub order: Option<Vec<usize>>,
    /// Devices of the machine that are not looked at, to keep the search short.
    pub ignored: Vec<usize>,
}

impl Pool {
    pub fn new(machine: &Machine, order: Option<&[usize]>) -> Pool {
        if let Some(order) = order {
            let classes = order.iter().map(|&device| vec![device]).collect();
            return Pool { classes, order: Some(order.to_vec()), ignored: Vec::new() };
        }
        let mut fastest: Vec<usize> = (0..machine.devices.len()).collect();
        let speed = |device: &usize| machine.devices[*device].rates.matmul_gflops;
        fastest.sort_by(|a, b| speed(b).total_cmp(&speed(a)));
        let mut pool = Pool { classes: Vec::new(), order: None, ignored: Vec::new() };
        for device in fastest {
            let alike = pool.classes.iter_mut().find(|class| interchangeable(machine, class[0], device));
            match alike {
                Some(class) => class.push(device),
                None => pool.classes.push(vec![device]),
            }
            if pool.sets() > MOST_SETS {
                pool.classes.iter_mut().for_each(|class| class.retain(|&other| other != device));
                pool.classes.retain(|class| !class.is_empty());
                pool.ignored.push(device);
            }
        }
        pool.classes.iter_mut().for_each(|class| class.sort_unstable());
        pool.classes.sort();
        pool
    }

    /// Numbers of devices of each class.
    pub fn sets(&self) -> usize {
        self.classes.iter().map(|class| class.len() + 1).product()
    }

    /// How many devices there are.
    pub fn len(&self) -> usize {
        self.classes.iter().map(Vec::len).sum()
    }

    /// The class of a device.
    pub fn class_of(&self, device: usize) -> usize {
        self.classes.iter().position(|class| class.contains(&device)).unwrap_or_default()
    }
}

/// Whether two devices differ in nothing but their names.
pub(super) fn interchangeable(machine: &Machine, a: usize, b: usize) -> bool {
    let profile = |device: usize| DeviceProfile {
        name: String::new(),
        driver: String::new(),
        adapter: None,
        ..machine.devices[device].clone()
    };
    // The other device as each of the two sees it.
    let seen = |device: usize| {
        if device == a {
            b
        } else if device == b {
            a
        } else {
            device
        }
    };
    let alike = |i: usize| {
        let j = seen(i);
        machine.link(a, i) == machine.link(b, j)
            && machine.link(i, a) == machine.link(j, b)
            && machine.slowdown(a, i) == machine.slowdown(b, j)
            && machine.slowdown(i, a) == machine.slowdown(j, b)
    };
    profile(a) == profile(b) && (0..machine.devices.len()).filter(|&i| i != a).all(alike)
}

/// Where a model may be cut: at the cuts that are fixed, or anywhere. Of many layers only between blocks, and of very many only
/// every so many; small changes of a plan then find the exact place.
fn marks(starts: &[Layers], cuts: Option<Vec<usize>>, pool: &Pool) -> Vec<usize> {
    let layers = starts.len() - 1;
    if let Some(cuts) = cuts {
        return [0].into_iter().chain(cuts).chain([layers]).collect();
    }
    let mut places: Vec<usize> = (0..=layers).filter(|&at| starts[at].is_whole()).collect();
    // There must be one for each stage that a schedule may have.
    if layers <= MOST_HALVES || places.len() <= layers.min(MOST_CHUNKS * pool.len()) {
        places = (0..=layers).collect();
    }
    let layers = places.len() - 1;
    let few = (2 * MOST_RANGES / (pool.sets() * pool.classes.len())).isqrt();
    // Every rank needs a part, several if it has several stages.
    let parts = layers.min(MOST_PARTS).min(few.max(MOST_CHUNKS * pool.len()));
    (0..=parts).map(|part| places[part * layers / parts]).collect()
}

impl<'a> Space<'a> {
    /// Whether every cut is at a mark.
    pub fn is_fine(&self) -> bool {
        self.is_cut || self.marks.len() == self.layers() + 1
    }

    /// How many layers there are.
    pub fn layers(&self) -> usize {
        self.marks[self.marks.len() - 1]
    }

    /// Checks the options. `machine` has the budgets that apply.
    pub fn new(workload: &'a Workload, machine: &'a Machine, options: &Options) -> Result<Space<'a>> {
        check(workload, machine, options)?;
        let cuts = options.cuts.as_ref().map(|cuts| cut(workload, cuts)).transpose()?;
        let pool = Pool::new(machine, options.devices.as_deref());
        let mut space = Space {
            prices: Vec::new(),
            batchings: Vec::new(),
            forms: Vec::new(),
            marks: marks(&workload.starts(), cuts, &pool),
            is_cut: options.cuts.is_some(),
            pool,
            recompute: options.recompute.clone(),
            named: true,
            auto: false,
        };
        let name = match &options.schedule {
            ScheduleChoice::Any => None,
            ScheduleChoice::Named(name) if name == AUTO => {
                space.named = false;
                None
            }
            ScheduleChoice::Named(name) => Some(name.as_str()),
            ScheduleChoice::Given(schedule) => {
                schedule.validate()?;
                Some(schedule.name.as_str())
            }
        };
        let given = match &options.schedule {
            ScheduleChoice::Given(schedule) => Some(schedule),
            _ => None,
        };
        space.auto = name.is_none();
        let microbatches = given.map(|given| given.microbatches).or(options.microbatches);
        for (at, batching) in workload.batchings.iter().enumerate() {
            if microbatches.is_none_or(|wanted| wanted == batching.microbatches) {
                space.batchings.push(at);
                space.prices.push(Prices::new(workload, batching, machine));
            }
        }
        if let Some(wanted) = microbatches.filter(|_| space.batchings.is_empty()) {
            let known: Vec<String> = workload.batchings.iter().map(|b| b.microbatches.to_string()).collect();
            let message =
                format!("{wanted} microbatches do not divide the batch; use one of {}", known.join(", "));
            return Err(Error::config("microbatches", message));
        }
        space.add_forms(name, given, &workload.starts())?;
        Ok(space)
    }

    fn add_forms(&mut self, name: Option<&str>, given: Option<&Schedule>, starts: &[Layers]) -> Result<()> {
        let layers = self.layers();
        let most = self.pool.len().min(layers);
        let least = if self.pool.order.is_some() { self.pool.len() } else { 1 };
        let mut refused = None;
        let mut room = MOST_CELLS;
        for (batching, prices) in self.prices.iter().enumerate() {
            if let Some(given) = given {
                if (least..=self.pool.len()).contains(&given.ranks.len()) && given.stages <= layers {
                    self.forms.push(Form::new(batching, given.clone())?);
                }
                continue;
            }
            let microbatches = prices.batching.microbatches;
            let cells = (least..=most).sum::<usize>().saturating_mul(microbatches);
            if cells > room {
                let message = format!(
                    "{microbatches} over {} devices are more than can be planned; use fewer of either",
                    self.pool.len()
                );
                refused = Some(Error::config("microbatches", message));
                continue;
            }
            room -= cells;
            for ranks in least..=most {
                match forms(name, ranks, layers, batching, microbatches) {
                    Ok(forms) => self.forms.extend(forms),
                    Err(error) => refused = Some(error),
                }
            }
        }
        let what = name.map_or("no schedule".to_string(), |name| format!("{name} is not a schedule that"));
        if self.forms.is_empty() {
            let ranks = given.map_or(most, |given| given.ranks.len());
            let message = format!(
                "{what} can divide {} over {ranks} of {} devices",
                Layers::of_model(starts),
                self.pool.len()
            );
            return Err(refused.unwrap_or_else(|| Error::config("schedule", message)));
        }
        let parts = self.marks.len() - 1;
        if self.is_cut {
            self.forms.retain(|form| form.stages() == parts);
        }
        if let RecomputeChoice::Stages(stages) = &self.recompute {
            self.forms.retain(|form| form.stages() >= stages.len());
        }
        if self.forms.is_empty() {
            let (key, stages) = match &self.recompute {
                RecomputeChoice::Stages(stages) if !self.is_cut => ("recompute", stages.len()),
                _ => ("cuts", parts),
            };
            let message = format!("{what} has the {stages} stages of `{key}` on {least} to {most} devices");
            return Err(refused.unwrap_or_else(|| Error::config(key, message)));
        }
        Ok(())
    }
}

/// Checks what does not depend on the schedule.
fn check(workload: &Workload, machine: &Machine, options: &Options) -> Result<()> {
    let (layers, devices) = (workload.layers.len(), machine.devices.len());
    if layers == 0 || devices == 0 || workload.batchings.is_empty() {
        return Err(Error::config("plan", "a plan needs a layer, a device and a microbatch"));
    }
    if options.budgets.len() > devices {
        let message = format!("{} sizes for {devices} devices", options.budgets.len());
        return Err(Error::config("memory", message));
    }
    if let Some(order) = &options.devices {
        if order.is_empty() {
            return Err(Error::config("devices", "the list is empty; name at least one"));
        }
        if let Some(index) = order.iter().find(|&&index| index >= devices) {
            let message = format!(
                "device {index} does not exist: {} has {devices} (0 to {})",
                machine.name,
                devices - 1
            );
            return Err(Error::config("devices", message));
        }
        if let Some(at) = (1..order.len()).find(|&at| order[..at].contains(&order[at])) {
            let message = format!("device {} is named twice", order[at]);
            return Err(Error::config("devices", message));
        }
        if order.len() > layers {
            let all: Layers = workload.layers.iter().map(|layer| layer.size).sum();
            let message = format!("{} cannot be divided over {} devices", all.counted(), order.len());
            return Err(Error::config("devices", message));
        }
    }
    Ok(())
}

/// The layers at which these cuts are.
fn cut(workload: &Workload, cuts: &[Layers]) -> Result<Vec<usize>> {
    Layers::cut(cuts, &workload.starts()).map_err(|message| Error::config("cuts", message))
}
