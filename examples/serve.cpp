// Runs a packaged model without Python: `serve model.pt2 [images.raw [mask.raw ...]]`.
//
// One file for each input, in their order: the plain numbers of a whole batch, fractions as 32-bit floats, others in
// the type of the input. Images are normalised as the model's metadata says. Without files, images are noise, and
// what is no fraction is ones. Prints the highest entry of the first output for each image, and the time of a call.

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>
#include <stdexcept>

using Metadata = std::unordered_map<std::string, std::string>;
using Shape = std::vector<int64_t>;

const std::map<std::string, at::ScalarType> kTypes = {
    {"float64", at::kDouble}, {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16},
    {"int64", at::kLong},     {"int32", at::kInt},     {"uint8", at::kByte},   {"bool", at::kBool}};

struct Input {
  std::string name;
  at::ScalarType type;
  Shape shape;  // of one image, if it has a batch, else of the whole
  bool batched;
};

std::runtime_error refusal(const std::string& words) { return std::runtime_error(words); }

// The inputs that idlefx has written down, a line each: type, sizes, name, as in "float32 batch,3,224,224 x".
std::vector<Input> inputs_of(const Metadata& metadata) {
  std::vector<Input> inputs;
  std::istringstream lines(metadata.at("idlefx_inputs"));
  std::string type, sizes, name, size;
  while (lines >> type >> sizes && std::getline(lines >> std::ws, name)) {
    Input input{name, kTypes.at(type), {}, sizes.substr(0, sizes.find(',')) == "batch"};
    std::istringstream parts(sizes == "scalar" ? "" : sizes);
    if (input.batched) std::getline(parts, size, ',');
    while (std::getline(parts, size, ',')) {
      if (size.find("batch") != std::string::npos) throw refusal("`" + name + "` has a size " + size + ", which serve does not know");
      input.shape.push_back(std::stoll(size));
    }
    inputs.push_back(input);
  }
  return inputs;
}

at::Tensor read(const Input& input, const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw refusal(std::string("cannot read ") + path);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  const auto stored = at::isFloatingType(input.type) ? at::kFloat : input.type;
  int64_t whole = at::elementSize(stored);
  for (const auto size : input.shape) whole *= size;
  const int64_t count = bytes.size() / whole;
  if (count == 0 || bytes.size() % whole || (!input.batched && count != 1))
    throw refusal(std::string(path) + " does not hold whole `" + input.name + "` of " + std::to_string(whole) + " bytes");
  Shape shape = input.shape;
  if (input.batched) shape.insert(shape.begin(), count);
  return at::from_blob(const_cast<char*>(bytes.data()), shape, stored).clone();
}

at::Tensor made_up(const Input& input, int64_t images) {
  Shape shape = input.shape;
  if (input.batched) shape.insert(shape.begin(), images);
  return at::isFloatingType(input.type) ? at::randn(shape) : at::ones(shape);
}

// The compiled code does not look at what it is given.
void check_batch(const std::vector<Input>& inputs, const std::vector<at::Tensor>& tensors, const std::string& range) {
  int64_t fewest, most, images = -1;
  std::istringstream(range) >> fewest >> most;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!inputs[i].batched) continue;
    if (images < 0) images = tensors[i].size(0);
    if (tensors[i].size(0) != images)
      throw refusal("`" + inputs[i].name + "` is for " + std::to_string(tensors[i].size(0)) + " images of " + std::to_string(images));
    if (images < fewest || images > most)
      throw refusal(std::to_string(images) + " images, the model takes " + range);
  }
}

int run(int count, char** arguments) {
  if (count < 2) throw refusal("usage: serve model.pt2 [images.raw [mask.raw ...]]");
  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader loader(arguments[1]);
  const auto metadata = loader.get_metadata();
  if (!metadata.count("idlefx_inputs")) throw refusal("the file was not made by this idlefx.package");

  const auto inputs = inputs_of(metadata);
  if (count > 2 && count - 2 != static_cast<int>(inputs.size()))
    throw refusal(std::to_string(count - 2) + " files, the model takes " + std::to_string(inputs.size()));
  std::vector<at::Tensor> tensors;
  for (size_t i = 0; i < inputs.size(); ++i)
    tensors.push_back(count > 2 ? read(inputs[i], arguments[i + 2]) : made_up(inputs[i], std::stoll(metadata.at("idlefx_batch"))));
  check_batch(inputs, tensors, metadata.at("idlefx_batch"));
  const at::Device home(metadata.at("idlefx_device"));
  for (size_t i = 0; i < inputs.size(); ++i) tensors[i] = tensors[i].to(home, inputs[i].type).contiguous();

  loader.run(tensors);  // warm
  const auto start = std::chrono::steady_clock::now();
  const auto output = loader.run(tensors)[0].to(at::kCPU, at::kFloat).flatten(1);
  const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;

  const auto [score, place] = output.max(1);
  for (int64_t image = 0; image < output.size(0); ++image)
    std::cout << "image " << image << ": " << place[image].item<int64_t>() << " (" << score[image].item<float>() << ")\n";
  std::cout << taken.count() << " ms for " << output.size(0) << " images\n";
  return 0;
}

int main(int count, char** arguments) {
  try {
    return run(count, arguments);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
  }
}
