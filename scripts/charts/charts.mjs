// What the page of a report takes of Vega: nothing that evaluates text as a program.
export { parse, View, Warn } from "vega";
export { compile } from "vega-lite";
export { expressionInterpreter } from "vega-interpreter";
