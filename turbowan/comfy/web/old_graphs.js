// Graphs that were written or saved before these nodes: their widget values are positional, and are put in order here
// before the page reads them. Prompts in the API's form name their inputs and need none of this.

import { app } from "../../scripts/app.js";

// our folder in custom_nodes, as the server names it in definitions
const MODULE = `custom_nodes.${decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2))}`;
// after each seed the page adds a widget of its own: where it stands, and how many values its node was published with
const PUBLISHED = {
  TurboDiffusionI2VSampler: { control: 7, count: 11 },
  TurboWanDualExpertSampler: { control: 3, count: 6 },
  TurboDiffusionI2V: { control: 10, count: 14 },
};
const SCHEDULER = "bong_tangent"; // of the pack RES4LYF; published graphs of TurboDiffusion ask for it
const INSTEAD = "simple";

const ours = new Set(); // keys of nodes that come from this pack
const schedulers = new Map(); // key of any node -> schedulers that it knows

/**
 * A node's values with one for the widget after its seed, which graphs written by hand lack: all that follow would land
 * one widget late. Three forms are known by what stands in its place:
 * a word: saved from the page, right as it is;
 * a boolean, then something else: `use_ode` of a graph written by hand, also where the first nodes opened and saved it
 *   (a default was then added at the end);
 * two booleans: such a graph saved after `use_ode` was set once more.
 */
export function inOrder(type, values) {
  const { control, count } = PUBLISHED[type] ?? {};
  if (typeof values?.[control] !== "boolean") return values;
  const rest = values.slice(typeof values[control + 1] === "boolean" ? control + 1 : control);
  return [...values.slice(0, control), "fixed", ...rest].slice(0, count);
}

/** Put a scheduler that is known here in the place of one that is not, in graphs with a node of ours; says where. */
export function replaceScheduler(graph) {
  const parts = [graph, ...(graph.definitions?.subgraphs ?? [])];
  const nodes = parts.flatMap((part) => part.nodes ?? []);
  if (!nodes.some((node) => ours.has(node.type))) return [];
  const changed = [];
  for (const node of nodes) {
    const known = schedulers.get(node.type);
    const at = Array.isArray(node.widgets_values) ? node.widgets_values.indexOf(SCHEDULER) : -1;
    if (!known || known.includes(SCHEDULER) || at < 0) continue;
    node.widgets_values[at] = INSTEAD;
    changed.push(node.title ?? node.type);
  }
  return changed;
}

function say(detail) {
  console.warn(`turbowan: ${detail}`);
  app.extensionManager?.toast?.add?.({ severity: "warn", summary: "turbowan", detail, life: 15000 });
}

app.registerExtension({
  name: "turbowan.OldGraphs",

  beforeRegisterNodeDef(nodeType, definition) {
    const [kind, options] = definition.input?.required?.scheduler ?? [];
    if (kind) schedulers.set(definition.name, Array.isArray(kind) ? kind : (options?.options ?? []));
    if (definition.python_module !== MODULE) return;
    ours.add(definition.name);
    const configure = nodeType.prototype.configure;
    nodeType.prototype.configure = function (saved) {
      return configure.call(this, { ...saved, widgets_values: inOrder(definition.name, saved.widgets_values) });
    };
  },

  beforeConfigureGraph(graph) {
    const changed = replaceScheduler(graph);
    if (changed.length) {
      say(
        `The scheduler '${SCHEDULER}' belongs to the pack RES4LYF, which is not installed here. ` +
          `'${INSTEAD}' takes its place in: ${changed.join(", ")}.`,
      );
    }
  },
});
