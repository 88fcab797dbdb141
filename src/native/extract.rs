//! The arguments of handlers. An extractor takes its part of the request, or refuses with a [`Rejection`], which is
//! recorded as the `TypeError` that a Python function called like this would raise.

use std::any::{Any, TypeId, type_name};
use std::collections::HashMap;
use std::fmt::{self, Display};
use std::sync::Arc;

use indexmap::IndexMap;
use serde::de::{DeserializeOwned, Deserializer, Error as _, Visitor};

use super::context::TaskContext;
use super::error::TaskError;
use crate::protocol::json;

/// What one call of a handler is given.
pub struct Call {
    pub(super) context: TaskContext,
    pub(super) arguments: Arguments,
    pub(super) states: Arc<States>,
}

/// Positional and keyword arguments, each as JSON text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Arguments {
    pub(super) args: Vec<String>,
    pub(super) kwargs: IndexMap<String, String>,
}

impl Arguments {
    /// The positional ones as one JSON array.
    pub(super) fn args_text(&self) -> String {
        format!("[{}]", self.args.join(", "))
    }

    /// The keyword ones as one JSON object.
    pub(super) fn kwargs_text(&self) -> String {
        let mut out = String::from("{");
        for (index, (name, value)) in self.kwargs.iter().enumerate() {
            if index > 0 {
                out.push_str(", ");
            }
            json::write_string(&mut out, name);
            out.push_str(": ");
            out.push_str(value);
        }
        out.push('}');
        out
    }
}

/// The values given to [`super::WorkerBuilder::state`], one a type.
#[derive(Clone, Default)]
pub struct States(HashMap<TypeId, Arc<dyn Any + Send + Sync>>);

impl States {
    /// Adds a value. `false`: there was one of its type.
    pub(super) fn insert<T: Any + Send + Sync>(&mut self, value: T) -> bool {
        self.0.insert(TypeId::of::<T>(), Arc::new(value)).is_none()
    }

    fn get<T: Any + Clone>(&self) -> Option<T> {
        self.0.get(&TypeId::of::<T>())?.downcast_ref::<T>().cloned()
    }
}

/// Which arguments an extractor takes. What no extractor of a handler takes must not be given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Takes {
    /// The positional ones.
    pub args: bool,
    /// The keyword ones.
    pub kwargs: bool,
}

impl Takes {
    /// What two extractors take together.
    pub const fn and(self, other: Self) -> Self {
        Self { args: self.args || other.args, kwargs: self.kwargs || other.kwargs }
    }
}

/// Why a request does not fit a handler.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// The number of positional arguments is wrong.
    #[error("{task}() takes {takes} positional argument{} but {given} {} given", plural(*.takes), verb(*.given))]
    Count {
        /// Name of the task.
        task: String,
        /// How many it takes.
        takes: usize,
        /// How many were given.
        given: usize,
    },
    /// An argument is missing.
    #[error("{task}() missing 1 required positional argument: '{name}'")]
    Missing {
        /// Name of the task.
        task: String,
        /// Name of the argument.
        name: String,
    },
    /// A keyword argument that the task does not have.
    #[error("{task}() got an unexpected keyword argument '{name}'")]
    Unexpected {
        /// Name of the task.
        task: String,
        /// Name of the argument.
        name: String,
    },
    /// An argument was given both by position and by name.
    #[error("{task}() got multiple values for argument '{name}'")]
    Twice {
        /// Name of the task.
        task: String,
        /// Name of the argument.
        name: String,
    },
    /// A value does not have the type that the handler asks for.
    #[error("{task}() {reason}")]
    Type {
        /// Name of the task.
        task: String,
        /// What the value is and what was asked for.
        reason: String,
    },
    /// No state of this type was given to the worker.
    #[error("no state of type {0} was given to the worker: call `.state(…)` on its builder")]
    State(&'static str),
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

fn verb(count: usize) -> &'static str {
    if count == 1 { "was" } else { "were" }
}

impl Rejection {
    pub(super) fn into_error(self) -> TaskError {
        let kind = if matches!(self, Self::State(_)) { "RuntimeError" } else { "TypeError" };
        TaskError::new(kind, self.to_string())
    }

    fn type_error(call: &Call, error: impl Display) -> Self {
        let task = call.context.task.clone();
        let text = error.to_string();
        // The place is one in a text that the sender never saw.
        let reason = text.split(" at line ").next().unwrap_or(&text).to_owned();
        match reason.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`')) {
            Some(name) => Self::Missing { task, name: name.to_owned() },
            None => Self::Type { task, reason },
        }
    }
}

/// An argument of a handler.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no argument of a task handler",
    label = "not an extractor",
    note = "take the task's arguments as `Args<(A, B)>`, `Kwargs<T>` or `Params<T>`, shared values as `State<T>`, and the request as `TaskContext`"
)]
pub trait FromTask: Sized {
    /// What it takes of the arguments.
    const TAKES: Takes = Takes { args: false, kwargs: false };

    /// Takes its part of the call.
    ///
    /// # Errors
    /// When the call does not fit.
    fn from_task(call: &Call) -> Result<Self, Rejection>;

    /// Checks, when the worker is built, what does not depend on a call.
    ///
    /// # Errors
    /// When no call can ever fit.
    fn check(states: &States) -> Result<(), Rejection> {
        let _ = states;
        Ok(())
    }
}

/// The positional arguments: a tuple, one member an argument, or a `Vec`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Args<T>(
    /// The arguments.
    pub T,
);

impl<T: DeserializeOwned> FromTask for Args<T> {
    const TAKES: Takes = Takes { args: true, kwargs: false };

    fn from_task(call: &Call) -> Result<Self, Rejection> {
        let given = call.arguments.args.len();
        if let Shape::Tuple(takes) = shape::<T>()
            && takes != given
        {
            return Err(Rejection::Count { task: call.context.task.clone(), takes, given });
        }
        let text = call.arguments.args_text();
        serde_json::from_str(&text).map(Self).map_err(|error| Rejection::type_error(call, error))
    }
}

/// The keyword arguments: a struct or a map. Names that a struct does not have are refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kwargs<T>(
    /// The arguments.
    pub T,
);

impl<T: DeserializeOwned> FromTask for Kwargs<T> {
    const TAKES: Takes = Takes { args: false, kwargs: true };

    fn from_task(call: &Call) -> Result<Self, Rejection> {
        if let Shape::Struct(fields) = shape::<T>() {
            no_unexpected(call, fields)?;
        }
        let text = call.arguments.kwargs_text();
        serde_json::from_str(&text).map(Self).map_err(|error| Rejection::type_error(call, error))
    }
}

/// All arguments as a struct, bound as Python binds them: positional ones to its fields in order, keyword ones by
/// name, absent ones by `#[serde(default)]`.
///
/// ```
/// # use celeriac::native::{Params, TaskError};
/// #[derive(serde::Deserialize)]
/// struct Resize { path: String, #[serde(default)] width: u32 }
///
/// // Takes `resize.delay("a.png", 80)`, `resize.delay("a.png", width=80)` and `resize.delay(path="a.png")`.
/// async fn resize(Params(resize): Params<Resize>) -> Result<u32, TaskError> {
///     Ok(resize.width.max(resize.path.len() as u32))
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Params<T>(
    /// The arguments.
    pub T,
);

impl<T: DeserializeOwned> FromTask for Params<T> {
    const TAKES: Takes = Takes { args: true, kwargs: true };

    fn from_task(call: &Call) -> Result<Self, Rejection> {
        let task = || call.context.task.clone();
        let Shape::Struct(fields) = shape::<T>() else {
            let reason = format!("cannot be bound: {} is no struct with named fields", type_name::<T>());
            return Err(Rejection::Type { task: task(), reason });
        };
        no_unexpected(call, fields)?;
        let Arguments { args, kwargs } = &call.arguments;
        if args.len() > fields.len() {
            return Err(Rejection::Count { task: task(), takes: fields.len(), given: args.len() });
        }
        let mut bound = Arguments::default();
        for (name, value) in fields.iter().zip(args) {
            if kwargs.contains_key(*name) {
                return Err(Rejection::Twice { task: task(), name: (*name).to_owned() });
            }
            bound.kwargs.insert((*name).to_owned(), value.clone());
        }
        bound.kwargs.extend(kwargs.clone());
        serde_json::from_str(&bound.kwargs_text())
            .map(Self)
            .map_err(|error| Rejection::type_error(call, error))
    }
}

fn no_unexpected(call: &Call, fields: &[&str]) -> Result<(), Rejection> {
    match call.arguments.kwargs.keys().find(|name| !fields.contains(&name.as_str())) {
        Some(name) => Err(Rejection::Unexpected { task: call.context.task.clone(), name: name.clone() }),
        None => Ok(()),
    }
}

/// A value that was given to [`super::WorkerBuilder::state`], cloned for each call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State<T>(
    /// The value.
    pub T,
);

impl<T: Any + Clone> FromTask for State<T> {
    fn from_task(call: &Call) -> Result<Self, Rejection> {
        call.states.get().map(Self).ok_or(Rejection::State(type_name::<T>()))
    }

    fn check(states: &States) -> Result<(), Rejection> {
        if states.0.contains_key(&TypeId::of::<T>()) {
            Ok(())
        } else {
            Err(Rejection::State(type_name::<T>()))
        }
    }
}

/// How a type asks to be deserialized.
enum Shape {
    /// A tuple of so many.
    Tuple(usize),
    /// A struct with these fields.
    Struct(&'static [&'static str]),
    /// Anything else.
    Other,
}

fn shape<T: DeserializeOwned>() -> Shape {
    let mut shape = Shape::Other;
    // It always fails, after it has been told what was asked for.
    let _ = T::deserialize(Probe(&mut shape));
    shape
}

struct Probe<'s>(&'s mut Shape);

/// What the probe says instead of a value.
type Probed = serde::de::value::Error;

impl<'de> Deserializer<'de> for Probe<'_> {
    type Error = Probed;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Probed> {
        Err(Probed::custom("probed"))
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, length: usize, _: V) -> Result<V::Value, Probed> {
        *self.0 = Shape::Tuple(length);
        Err(Probed::custom("probed"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Probed> {
        *self.0 = Shape::Struct(fields);
        Err(Probed::custom("probed"))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple_struct map enum identifier ignored_any
    }
}

impl fmt::Debug for States {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "States({})", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{DeliveryInfo, Json};
    use serde::Deserialize;

    fn call(args: &[&str], kwargs: &[(&str, &str)]) -> Call {
        Call {
            context: TaskContext {
                id: "i".into(),
                task: "resize".into(),
                retries: 0,
                root_id: None,
                parent_id: None,
                group_id: None,
                delivery_info: DeliveryInfo::default(),
                hostname: "celery@tests".into(),
                headers: Json::empty(),
            },
            arguments: Arguments {
                args: args.iter().map(|text| (*text).to_owned()).collect(),
                kwargs: kwargs.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect(),
            },
            states: Arc::default(),
        }
    }

    #[derive(Debug, Deserialize, PartialEq)]
    struct Resize {
        path: String,
        #[serde(default)]
        width: u32,
    }

    fn refused<T: FromTask>(call: &Call) -> String {
        T::from_task(call).err().expect("it must be refused").to_string()
    }

    #[test]
    fn positional_arguments_become_a_tuple_or_a_vec() {
        let Args((path, width)): Args<(String, u32)> = Args::from_task(&call(&["\"a\"", "3"], &[])).unwrap();
        assert_eq!((path.as_str(), width), ("a", 3));
        assert_eq!(Args::from_task(&call(&["1", "2"], &[])), Ok(Args(vec![1, 2])));
        assert_eq!(Args::from_task(&call(&["1"], &[])), Ok(Args((1,))));
    }

    #[test]
    fn a_wrong_call_is_refused_in_pythons_words() {
        type Pair = Args<(String, u32)>;
        let none: [(&str, &str); 0] = [];
        for (text, expected) in [
            (
                refused::<Pair>(&call(&["\"a\""], &none)),
                "resize() takes 2 positional arguments but 1 was given",
            ),
            (
                refused::<Pair>(&call(&["1", "2", "3"], &none)),
                "resize() takes 2 positional arguments but 3 were given",
            ),
            (
                refused::<Pair>(&call(&["1", "2"], &none)),
                "resize() invalid type: integer `1`, expected a string",
            ),
            (
                refused::<Params<Resize>>(&call(&[], &none)),
                "resize() missing 1 required positional argument: 'path'",
            ),
            (
                refused::<Params<Resize>>(&call(&["\"a\""], &[("path", "\"b\"")])),
                "resize() got multiple values for argument 'path'",
            ),
            (
                refused::<Params<Resize>>(&call(&["\"a\""], &[("height", "1")])),
                "resize() got an unexpected keyword argument 'height'",
            ),
            (
                refused::<Params<Resize>>(&call(&["1", "2", "3"], &none)),
                "resize() takes 2 positional arguments but 3 were given",
            ),
            (
                refused::<Kwargs<Resize>>(&call(&[], &[("x", "1")])),
                "resize() got an unexpected keyword argument 'x'",
            ),
            (
                refused::<Kwargs<Resize>>(&call(&[], &none)),
                "resize() missing 1 required positional argument: 'path'",
            ),
        ] {
            assert_eq!(text, expected);
        }
    }

    #[test]
    fn parameters_are_bound_by_position_by_name_or_by_default() {
        for (args, kwargs, width) in [
            (vec!["\"a\"", "3"], vec![], 3),
            (vec!["\"a\""], vec![("width", "4")], 4),
            (vec![], vec![("width", "5"), ("path", "\"a\"")], 5),
            (vec!["\"a\""], vec![], 0),
        ] {
            let bound = Params::<Resize>::from_task(&call(&args, &kwargs)).unwrap();
            assert_eq!(bound.0, Resize { path: "a".into(), width });
        }
    }

    #[test]
    fn a_state_that_was_not_given_is_refused_before_any_call() {
        assert_eq!(State::<u8>::check(&States::default()), Err(Rejection::State("u8")));
        let mut states = States::default();
        assert!(states.insert(7_u8) && !states.insert(8_u8));
        assert_eq!(State::<u8>::check(&states), Ok(()));
        let call = Call { states: Arc::new(states), ..call(&[], &[]) };
        assert_eq!(State::<u8>::from_task(&call), Ok(State(8)));
    }
}
