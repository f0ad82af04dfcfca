variable "region" {
  type = string
}

variable "name" {
  description = "What everything here is named after; the bucket too, so it has to be yours alone in all of S3."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{2,40}$", var.name))
    error_message = "Small letters, digits and hyphens, 3 to 41 of them, a letter first."
  }
}

variable "cluster" {
  description = "Name of the EKS cluster that the workers run in. It has to exist, with an OIDC provider."
  type        = string
}

variable "subnets" {
  description = "Private subnets of the cluster's network, in two zones at least: for the database and the GPU nodes."
  type        = list(string)
  validation {
    condition     = length(var.subnets) >= 2
    error_message = "The database wants subnets in two zones."
  }
}

variable "namespace" {
  description = "Namespace of infra/kubernetes."
  type        = string
  default     = "deleatur"
}

variable "database_class" {
  type    = string
  default = "db.t4g.small"
}

variable "gpu_instances" {
  description = "Kinds of machines for the GPU workers, the most wanted first. 24 GB of GPU memory train Stable Diffusion 1.x in fp32."
  type        = list(string)
  default     = ["g5.2xlarge", "g6.2xlarge"]
}

variable "gpu_capacity" {
  description = "SPOT: a third of the price, and taken away on two minutes' notice, which the workers are made for."
  type        = string
  default     = "SPOT"
  validation {
    condition     = contains(["SPOT", "ON_DEMAND"], var.gpu_capacity)
    error_message = "SPOT or ON_DEMAND."
  }
}

variable "gpu_nodes" {
  description = "How many GPU nodes at most. The cluster's autoscaler starts one for each replica of worker-gpu in overlays/aws, or, with a container for each run, for each stage that needs one."
  type        = number
  default     = 2
}
