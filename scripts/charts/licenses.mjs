// Writes the licenses of all packages that a build has taken into charts.js: node licenses.mjs METAFILE TARGET
import { readFileSync, readdirSync, writeFileSync } from "node:fs";

const [metafile, target] = process.argv.slice(2);
const inputs = Object.keys(JSON.parse(readFileSync(metafile, "utf8")).inputs);
const packages = [...new Set(inputs.map((path) => path.match(/node_modules\/((?:@[^/]+\/)?[^/]+)\//)?.[1]).filter(Boolean))].sort();
const text = packages.map((name) => {
  const folder = `node_modules/${name}`, about = JSON.parse(readFileSync(`${folder}/package.json`, "utf8"));
  const file = readdirSync(folder).find((one) => /^licen[cs]e/i.test(one));
  return `${name} ${about.version} (${about.license})\n\n${file ? readFileSync(`${folder}/${file}`, "utf8").trim() : "no text is shipped with the package"}\n`;
});
writeFileSync(target, `charts.js holds these packages.\n\n${text.join("\n----\n\n")}`);
